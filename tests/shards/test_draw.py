import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shards import rle
from shards.dataset import Category
from shards.draw import PALETTE, class_colour, draw_instances, legible_scale
from shards.sample import Instance

CATEGORIES = (Category(1, "Person", "/m/p"), Category(2, "Car", "/m/c"))
GREY = np.full((300, 400, 3), 128, np.uint8)


def boxed(category: int = 1, *, mask: bool = False, group: bool = False) -> Instance:
    area = np.zeros((300, 400), np.uint8)
    area[110:190, 160:240] = 1  # a margin of 10 pixels inside the box
    return Instance(category, (150.0, 100.0, 100.0, 100.0), rle.encode(area) if mask else None, is_group_of=group)


def drawn(*instances: Instance, **options: object) -> NDArray[np.uint8]:
    return np.asarray(draw_instances(GREY, instances, CATEGORIES, **options))  # type: ignore[arg-type]


def changed(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return (picture != 128).any(axis=2)


def test_a_mask_is_tinted_and_outlined() -> None:
    picture = drawn(boxed(mask=True))
    colour = np.array(class_colour(1), float)
    assert np.abs(picture[150, 200] - (128 * 0.6 + colour * 0.4)).max() <= 1
    assert np.abs(picture[150, 160] - colour).max() < 12  # the mask's rim
    assert not changed(picture)[150, 155]  # between mask and box
    np.testing.assert_array_equal(picture[150, 150], colour.astype(np.uint8))
    assert not changed(picture)[210:].any()


def test_a_box_without_a_mask_is_dashed_and_a_group_hatched() -> None:
    solid, dashed = changed(drawn(boxed(mask=True))), changed(drawn(boxed()))
    edge = np.s_[100:200, 249]
    assert solid[edge].all()
    assert 0.3 < dashed[edge].mean() < 0.7
    assert not dashed[110:190, 160:240].any()
    hatched = changed(drawn(boxed(group=True)))
    assert hatched[edge].all()
    assert 0.1 < hatched[110:190, 160:240].mean() < 0.5


def test_names_and_scores_are_written_on_plates() -> None:
    plain, named = drawn(boxed(mask=True)), drawn(boxed(mask=True), scores=[0.87])
    above = np.s_[80:99, 150:250]
    colour = np.array(class_colour(1), np.uint8)
    for picture in (plain, named):
        assert (picture[above] == colour).all(axis=2).any()
        assert (picture[above].max(axis=2) < 60).any()  # dark ink
    assert changed(named)[above].sum() > changed(plain)[above].sum()  # a wider plate
    assert changed(drawn(boxed(group=True)))[above].sum() > changed(plain)[above].sum()


def test_plates_stay_in_the_picture_and_apart() -> None:
    edges = [(0.0, 0.0, 60.0, 60.0), (380.0, 0.0, 20.0, 300.0), (0.0, 280.0, 400.0, 20.0), (-50.0, -50.0, 600.0, 600.0)]
    assert drawn(*(Instance(1 + i % 2, box, None) for i, box in enumerate(edges))).shape == GREY.shape
    one = changed(drawn(boxed(mask=True)))[:99].sum()
    two = changed(drawn(boxed(mask=True), boxed(mask=True)))
    assert two[:99].sum() == one  # the second name found a place of its own
    assert two[100:].sum() > changed(drawn(boxed(mask=True)))[100:].sum()


def test_colours_belong_to_classes() -> None:
    colours = [class_colour(number) for number in range(1, 61)]
    assert len(set(colours)) == 60
    assert colours[: len(PALETTE)] == list(PALETTE)
    assert all(max(colour) > 150 for colour in colours)


def test_the_picture_can_be_enlarged() -> None:
    assert drawn(boxed(mask=True), scale=2).shape == (600, 800, 3)
    assert changed(drawn(boxed(mask=True), scale=2))[300, 400]
    assert [legible_scale(*size) for size in ((1024, 768), (640, 480), (639, 10), (192, 192), (64, 64))] == [
        1,
        1,
        2,
        4,
        10,
    ]


def test_the_image_is_left_as_it_was() -> None:
    image = Image.fromarray(GREY.copy()).convert("L")
    picture = draw_instances(image, [boxed(mask=True)], CATEGORIES)
    assert (picture.mode, image.mode) == ("RGB", "L")
    assert np.asarray(image).std() == 0
    assert (draw_instances(image, [], CATEGORIES).tobytes()) == image.convert("RGB").tobytes()


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 scores for 2 instances"):
        drawn(boxed(), boxed(), scores=[0.5])
    with pytest.raises(ValueError, match="a mask is 10x10, the picture 400x300"):
        drawn(Instance(1, (0.0, 0.0, 5.0, 5.0), rle.encode(np.ones((10, 10)))))


def test_an_empty_mask_and_an_unknown_class() -> None:
    empty = Instance(9, (10.0, 200.0, 50.0, 50.0), rle.encode(np.zeros((300, 400))))
    assert changed(drawn(empty)).any()


def test_drawing_needs_no_torch() -> None:
    code = "import sys, shards.draw; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
