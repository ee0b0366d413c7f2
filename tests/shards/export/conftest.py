from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.format import rle
from shards.format.dataset import Category, Dataset
from shards.format.sample import Instance, MaskPrediction, Sample
from tests.support import jpeg, write_dataset

CATEGORIES = (Category(2, "Person", "/m/01g317"), Category(5, "Traffic light", "/m/015qff"))


def mask(rng: np.random.Generator, width: int, height: int) -> rle.Rle:
    """An ellipse; some have a hole, some a second part, a line of single pixels that touch at corners."""
    y, x = np.mgrid[:height, :width]
    center, radii = (rng.uniform(20, width - 20), rng.uniform(20, height - 20)), rng.uniform(7, 15, 2)
    away = ((x - center[0]) / radii[0]) ** 2 + ((y - center[1]) / radii[1]) ** 2
    bits = away < 1
    if rng.random() < 0.5:
        bits &= away > 0.15
    if rng.random() < 0.5:
        bits[np.arange(6), np.arange(6)] = True
    return rle.encode(bits)


def scene(number: int) -> Sample:
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(60, 120, 2))
    image = jpeg(width, height, number)
    if number == 1:  # a camera that was held upright
        turned = Image.Exif()
        turned[0x0112] = 6
        image = image[:2] + b"\xff\xe1" + (len(turned.tobytes()) + 2).to_bytes(2, "big") + turned.tobytes() + image[2:]
    masks = [mask(rng, width, height) for _ in range(int(rng.integers(2, 5)))]
    objects = [Instance(2, rle.bounds(found), found, f"b{n}", predicted_iou=0.5) for n, found in enumerate(masks)]
    objects[0] = Instance(5, (1.25, 2.5, 30.125, 40.0), None, "box", is_occluded=True)
    objects[-1] = replace(objects[-1], prediction=MaskPrediction(0.75, "run")) if number % 4 == 2 else objects[-1]
    if number % 2:
        objects[1] = Instance(5, rle.bounds(masks[1]), masks[1], "group", is_group_of=True, area=12.5)
    return Sample(
        image_id=f"{number:016x}",
        image=image,
        width=width,
        height=height,
        instances=tuple(objects) if number else (),
        verified_present=(2,) if number and number % 2 == 0 else (),
        verified_absent=() if number else (2, 5),
        license="https://creativecommons.org/licenses/by/2.0/",
        original_url=f"https://example.org/{number}",
    )


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """8 samples in train, of which the first has no object, and 3 in val. Read only."""
    splits = {"train": [scene(n) for n in range(8)], "val": [scene(n) for n in range(8, 11)]}
    return write_dataset(tmp_path_factory.mktemp("scenes"), splits, categories=CATEGORIES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
