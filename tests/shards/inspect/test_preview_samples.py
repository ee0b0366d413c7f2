from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from shards.common.errors import SampleError
from shards.format.dataset import open_dataset
from shards.format.sample import Sample
from shards.inspect.preview_samples import choose, first_rows, read_annotations, read_samples
from tests.support import sample, write_dataset


def rare(number: int) -> Sample:
    """Every twentieth sample has a car, every thirtieth no annotations."""
    one = sample(2 * number)
    if number % 20 == 0:
        return sample(2 * number + 1)
    return replace(one, instances=()) if number % 30 == 1 else one


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pick")
    write_dataset(root, {"train": [rare(n) for n in range(100)], "val": [rare(n) for n in range(100, 120)]})
    return root


def keys(root: Path | str, count: int, seed: int = 0) -> list[str]:
    dataset = open_dataset(str(root))
    return [dataset.index(row.split).image_id(row.row) for row in choose(dataset, count, seed)]


def test_choose_represents_every_class_and_split(root: Path) -> None:
    dataset = open_dataset(str(root))
    samples = [(row.split, one) for row, one in read_samples(dataset, choose(dataset, 12))]
    kinds = Counter((split, max((i.category_id for i in one.instances), default=0)) for split, one in samples)
    assert set(kinds) == {("train", 2), ("train", 1), ("train", 0), ("val", 2), ("val", 1)}
    assert kinds["val", 2] == 1  # val has one car
    assert kinds["train", 0] >= 2


def test_choose_depends_on_keys_and_seed_only(root: Path, tmp_path: Path) -> None:
    splits = {"train": reversed(range(100)), "val": range(100, 120)}
    write_dataset(tmp_path, {split: [rare(n) for n in numbers] for split, numbers in splits.items()}, per_shard=33)
    assert keys(root, 20) == keys(tmp_path, 20)
    assert keys(root, 20)[:5] == keys(root, 5)
    assert keys(root, 20) != keys(root, 20, seed=1)
    assert sorted(keys(root, 1000)) == sorted({rare(n).image_id for n in range(120)})
    assert keys(root, 0) == []


def test_first_rows_is_a_random_sample_of_a_split(root: Path) -> None:
    train, val = (open_dataset(str(root)).index(split) for split in ("train", "val"))
    rows = first_rows(train, 30).tolist()
    assert (rows, len(rows)) == (sorted(set(rows)), 30)
    assert set(first_rows(train, 20).tolist()) < set(rows)
    assert first_rows(val, 30).tolist() == list(range(20))
    assert rows != first_rows(train, 30, seed=1).tolist()


def test_read_annotations_names_the_damaged_sample(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": [sample(0), sample(1)]})
    dataset = open_dataset(str(tmp_path))
    shard = tmp_path / "train/000000.tar"
    data = bytearray(shard.read_bytes())
    data[dataset.table["offset"][1].as_py()] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SampleError, match=r"000000.tar: sample 0000000000000001 at offset \d+: no tar header"):
        read_annotations(dataset.root, dataset.index("train"), first_rows(dataset.index("train"), 2))
