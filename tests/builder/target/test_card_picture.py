"""The picture of a dataset card."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from builder.target.card_picture import choose_rows, draw_card_picture
from shards.format.dataset_card import CardPicture
from shards.format.index_schema import IndexRow
from shards.format.sample import Sample
from tests.support import CATEGORIES, sample, write_dataset


def row(key: str, offset: int, classes: tuple[int, ...], masks: tuple[int, ...], split: str = "train") -> IndexRow:
    shard = f"{split}/000000.tar"
    return IndexRow(key, split, shard, offset, 512, 7, 4, 3, classes, (1,) * len(classes), masks, (0,) * len(classes))


def test_classes_take_turns_and_images_with_masks_come_first() -> None:
    rows = [row(f"person{n}", n, (1,), (n % 2,)) for n in range(20)]
    rows += [row("background", 30, (), ()), row("car", 40, (2,), (0,)), row("both", 50, (1, 2), (1, 1))]
    rows += [row("val", 0, (3,), (1,), "val")]
    chosen = [one.image_id for one in choose_rows(rows)]
    assert chosen == ["person1", "both", "person3", "car", "person5", "person7", "person9", "person11"]
    assert [one.image_id for one in choose_rows(rows[::-1])] == chosen
    assert [one.image_id for one in choose_rows([rows[20]])] == ["background"]


def test_the_picture_shows_samples_with_their_annotations(tmp_path: Path) -> None:
    samples = [sample(number) for number in range(1, 4)]

    def drawn(name: str, samples: Sequence[Sample]) -> CardPicture:
        dataset = write_dataset(tmp_path / name, {"train": samples})
        rows = [IndexRow.from_values(values) for values in dataset.table.to_pylist()]
        picture = draw_card_picture(rows, CATEGORIES, lambda path: dataset.root / path)
        assert picture
        assert draw_card_picture(rows[::-1], CATEGORIES, lambda path: dataset.root / path) == picture
        (tmp_path / name / "train/000000.tar").unlink()
        assert draw_card_picture(rows, CATEGORIES, lambda path: dataset.root / path) is None
        return picture

    annotated, bare = drawn("annotated", samples), drawn("bare", [replace(one, instances=()) for one in samples])
    assert {one.image_id for one in annotated.samples} == {one.image_id for one in samples}
    one, other = (np.asarray(Image.open(io.BytesIO(found.jpeg)), dtype=int) for found in (annotated, bare))
    changed = (abs(one - other) > 30).any(axis=2)
    assert one.shape[1] <= 1200
    assert 0.2 < changed.mean() < 0.7
