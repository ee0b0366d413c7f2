"""The picture of the first training batches."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from shards.format import rle
from shards.format.dataset import Category
from shards.storage.location import Location
from tests.trainer import batches
from trainer.config.settings import LossConfig
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, PREDICTED, Batch
from trainer.data.mask_bitmaps import rasterise
from trainer.report.batch_pictures import FILE, HEIGHT, IMAGES, BatchPictures, draw_batches, rebuild_mask

CATEGORIES = tuple(Category(number, f"class {number}", f"/m/{number}") for number in range(1, 5))


def make_batch(count: int, objects: int = 3) -> Batch:
    return batches.batch_of([batches.scene(seed, 96, 128, objects) for seed in range(count)])


def test_a_mask_is_rebuilt_from_its_bitmap_in_a_smaller_picture_and_beyond_its_border() -> None:
    y, x = np.mgrid[:300, :400]
    mask = ((x - 390) / 120) ** 2 + ((y - 140) / 90) ** 2 < 1  # cut off at the right border
    bitmap = rasterise(rle.encode(mask))
    assert bitmap
    rebuilt = rebuild_mask(bitmap[0], torch.tensor(bitmap[1]) / 2, (200, 150))
    expected = np.asarray(Image.fromarray(mask).resize((200, 150)))
    assert rebuilt.shape == expected.shape
    assert (rebuilt & expected).sum() > 0.98 * (rebuilt | expected).sum()


def test_the_first_images_are_written_at_once_and_when_the_picture_is_full(tmp_path: Path) -> None:
    first, sizes = BatchPictures(Location(str(tmp_path)), CATEGORIES, LossConfig()), []
    for _ in range(4):
        first.add([make_batch(3), make_batch(3)])
        with Image.open(tmp_path / FILE) as picture:
            sizes.append(picture.size)
    assert IMAGES == 16
    assert sizes[0][1] == sizes[1][1] < sizes[2][1]  # after the first step, and full
    assert sizes[3] == sizes[2]
    BatchPictures(Location(str(tmp_path)), CATEGORIES, LossConfig(), 7).add([make_batch(3)])
    with Image.open(tmp_path / FILE) as picture:
        assert picture.size == sizes[2]  # of the run's first steps, also if it resumes
    assert sizes[0][1] / 2 < 1.2 * HEIGHT + 40  # six images, in two rows


def test_what_is_not_taught_is_not_drawn_and_ignored_regions_are_hatched() -> None:
    """Of one image, without a mask, a box and a region; the settings of the loss decide what is taught."""
    batch = make_batch(1, objects=1)
    batch.flags[:] = 0

    def drawn(flags: int, **loss: Any) -> np.ndarray:
        batch.flags[0, 0] = flags
        return np.asarray(draw_batches([batch], CATEGORIES, LossConfig(**loss)), dtype=np.int64)

    nothing = drawn(0, unmasked="background")
    ignored, group = drawn(IGNORED), drawn(GROUP_OF)
    assert (drawn(GROUP_OF, group_of="background") == nothing).all()
    assert (ignored == group).all()
    predicted = drawn(HAS_MASK | PREDICTED)
    assert (predicted != drawn(HAS_MASK)).any()  # its name says so
    assert (drawn(HAS_MASK | PREDICTED, predicted=0) == drawn(0)).all()
    box = drawn(0)
    assert 0 < (box != nothing).any(axis=2).sum() < (ignored != nothing).any(axis=2).sum()
