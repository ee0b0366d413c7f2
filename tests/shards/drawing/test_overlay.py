import inspect
import itertools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from shards.drawing.overlay import (
    FOUND,
    MISSED,
    PALETTE,
    SUPERFLUOUS,
    UNCOUNTED,
    class_colour,
    display_instances,
    display_top_masks,
    draw_instances,
    legible_scale,
)
from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, MaskPrediction

CATEGORIES = (Category(1, "Person", "/m/p"), Category(2, "Car", "/m/c"))
NAMES = ("BG", "Person", "Car")
GREY = np.full((300, 400, 3), 128, np.uint8)
MASKS = np.zeros((300, 400, 2), bool)  # a person in the middle, and a wide car at the top left
MASKS[110:190, 160:240, 0] = True
MASKS[10:40, 20:120, 1] = True
SHARED: dict[str, Any] = {"image": GREY, "class_ids": np.array([1, 2]), "class_names": NAMES}
MATTERPORT = SHARED | {"boxes": np.array([[110, 160, 190, 240], [10, 20, 40, 120]]), "masks": MASKS}
TOP = SHARED | {"mask": MASKS}


def boxed(*, mask: bool = False, group: bool = False) -> Instance:
    """An instance whose box has a margin of 10 pixels around the person of MASKS."""
    segmentation = rle.encode(MASKS[:, :, 0]) if mask else None
    return Instance(1, (150.0, 100.0, 100.0, 100.0), segmentation, is_group_of=group)


def drawn(*instances: Instance, **options: Any) -> NDArray[np.uint8]:
    return np.asarray(draw_instances(GREY, instances, CATEGORIES, **options))


def displayed(**arguments: Any) -> NDArray[np.uint8]:
    return np.asarray(display_instances(**{**MATTERPORT, **arguments}))


def changed(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return (picture != 128).any(axis=2)


def test_draw_instances_fills_and_outlines_a_mask() -> None:
    picture = drawn(boxed(mask=True))
    colour = np.array(class_colour(1), float)
    assert np.abs(picture[150, 200] - (128 * 0.6 + colour * 0.4)).max() <= 1
    assert np.abs(picture[150, 160] - colour).max() < 12  # the rim of the mask
    assert not changed(picture)[150, 155]  # between mask and box
    np.testing.assert_array_equal(picture[150, 150], colour.astype(np.uint8))
    assert not changed(picture)[210:].any()
    image = Image.fromarray(GREY.copy()).convert("L")
    assert draw_instances(image, [boxed(mask=True)], CATEGORIES).mode == "RGB"
    assert (image.mode, np.asarray(image).std()) == ("L", 0)  # unchanged


def test_draw_instances_dashes_the_outline_of_a_predicted_mask_and_writes_its_score() -> None:
    predicted = replace(boxed(mask=True), prediction=MaskPrediction(0.93, "run"))
    found, solid = drawn(predicted), drawn(boxed(mask=True))
    differs = (found != solid).any(axis=2)
    for side in (np.s_[110, 160:240], np.s_[189, 160:240], np.s_[110:190, 160], np.s_[110:190, 239]):
        assert 0.3 < differs[side].mean() < 0.7
    assert 0.3 < differs[100:200, 249].mean() < 0.7  # a mask that fills its box is seen to be predicted
    assert not differs[112:188, 162:238].any()  # filled alike
    assert np.array_equal(found, drawn(predicted, captions=["Person predicted 0.93"]))


def test_draw_instances_dashes_boxes_without_a_mask_and_hatches_groups() -> None:
    solid, dashed, hatched = (changed(drawn(one)) for one in (boxed(mask=True), boxed(), boxed(group=True)))
    edge, inside = np.s_[100:200, 249], np.s_[110:190, 160:240]
    assert solid[edge].all()
    assert 0.3 < dashed[edge].mean() < 0.7
    assert not dashed[inside].any()
    assert hatched[edge].all()
    assert 0.1 < hatched[inside].mean() < 0.5


def test_draw_instances_writes_names_and_scores_on_plates() -> None:
    above = np.s_[80:99, 150:250]
    plain, scored = drawn(boxed(mask=True)), drawn(boxed(mask=True), scores=[0.87])
    for picture in (plain, scored):
        assert (picture[above] == class_colour(1)).all(axis=2).any()
        assert (picture[above].min(axis=2) > 240).any()  # light text on a dark colour
    yellow = drawn(boxed(mask=True), colours=[class_colour(2)])
    assert (yellow[above].max(axis=2) < 60).any()  # dark text on a light one
    for wider in (scored, drawn(boxed(group=True))):
        assert changed(wider)[above].sum() > changed(plain)[above].sum()


def test_plates_stay_in_the_picture_and_apart() -> None:
    edges = [(0.0, 0.0, 60.0, 60.0), (380.0, 0.0, 20.0, 300.0), (0.0, 280.0, 400.0, 20.0), (-50.0, -50.0, 600.0, 600.0)]
    assert drawn(*(Instance(1 + i % 2, box, None) for i, box in enumerate(edges))).shape == GREY.shape
    one, two = changed(drawn(boxed(mask=True))), changed(drawn(boxed(mask=True), boxed(mask=True)))
    assert two[:99].sum() == one[:99].sum()  # the second name is elsewhere
    assert two[100:].sum() > one[100:].sum()


def test_names_with_accents_are_drawn_with_plain_letters() -> None:
    plain, accented, other = (
        drawn(boxed(mask=True), captions=[name]) for name in ("Anhanger", "Anhänger", "Anh行nger")
    )
    np.testing.assert_array_equal(accented, plain)
    assert (other != plain).any()


def test_without_room_for_its_name_an_object_has_one_if_it_is_the_first_of_its_class() -> None:
    person, tiny = boxed(mask=True), Instance(1, (20.0, 200.0, 4.0, 4.0), None)
    around = np.s_[180:230, 0:100]
    for number, is_named in ((1, False), (2, True)):
        picture = changed(drawn(person, replace(tiny, category_id=number), colours=[MISSED, MISSED]))
        assert (picture[around].sum() > 100) == is_named


def test_colours_are_distinct_and_bright_and_scales_legible() -> None:
    colours = [class_colour(number) for number in range(1, 61)]
    assert len(set(colours)) == 60
    assert colours[: len(PALETTE)] == list(PALETTE)
    assert all(max(colour) > 150 for colour in colours[len(PALETTE) :])
    picture = drawn(boxed(mask=True), scale=2)
    assert (picture.shape, changed(picture)[300, 400]) == ((600, 800, 3), True)
    sizes = ((1024, 768), (640, 480), (639, 10), (192, 192), (64, 64))
    assert [legible_scale(*size) for size in sizes] == [1, 1, 2, 4, 10]


def test_draw_instances_names_the_argument_that_does_not_match() -> None:
    for name in ("scores", "captions", "colours"):
        with pytest.raises(ValueError, match=f"{name} has a length of 1: it must be 2"):
            drawn(boxed(), boxed(), **{name: [None]})
    assert changed(drawn(Instance(9, (10.0, 200.0, 50.0, 50.0), rle.encode(np.zeros((300, 400)))))).any()
    with pytest.raises(ValueError, match="a mask is 10x10, the picture 400x300"):
        drawn(Instance(1, (0.0, 0.0, 5.0, 5.0), rle.encode(np.ones((10, 10)))))


def test_draw_instances_options_choose_what_is_drawn() -> None:
    masks, boxes = (changed(drawn(boxed(mask=True), **{f"show_{name}": False})) for name in ("boxes", "masks"))
    assert [each[150, [150, 200]].tolist() for each in (masks, boxes)] == [[False, True], [True, False]]
    assert boxes[100:200, 150].all()  # solid: there is a mask, although it is not shown
    own = drawn(boxed(mask=True), colours=[(10, 250, 10)], captions=[""])
    assert own[150, 150].tolist() == [10, 250, 10]


def test_display_instances_draws_arrays_of_matterport() -> None:
    person = Instance(1, (160.0, 110.0, 80.0, 80.0), rle.encode(MASKS[:, :, 0]))
    car = Instance(2, (20.0, 10.0, 100.0, 30.0), rle.encode(MASKS[:, :, 1]))
    expected = drawn(person, car, scores=[0.9, 0.8])
    for image in (GREY, GREY[:, :, 0], GREY[:, :, :1]):  # a grey image as well
        np.testing.assert_array_equal(displayed(image=image, scores=np.array([0.9, 0.8])), expected)
    bare = changed(displayed(boxes=np.array([[110, 160, 190, 240], [0, 0, 0, 0]]), scores=np.ones(2)))
    assert not bare[:70].any()  # a box of zeros is left out
    assert bare[150, 200]
    none = displayed(boxes=np.zeros((0, 4)), masks=np.zeros((300, 400, 0)), class_ids=np.zeros(0, int))
    np.testing.assert_array_equal(none, GREY)


def test_display_instances_options() -> None:
    plates = displayed(show_mask=False, show_bbox=False, captions=["a", "b"], colors=[(0, 1, 0), (1, 0, 0)])
    assert (plates[80:110, 160:240] == (0, 255, 0)).all(axis=2).any()
    assert not changed(plates)[115:].any()
    assert displayed(title="A street").shape == (326, 400, 3)
    axes = Figure((4, 3)).subplots(1)
    picture = displayed(title="A street", figsize=(8, 8), ax=axes)
    assert picture.shape == GREY.shape
    np.testing.assert_array_equal(axes.get_images()[0].get_array(), picture)
    assert (axes.get_title(), axes.axison) == ("A street", False)


ODD: dict[str, tuple[Any, ...]] = {
    "masks": (None, np.zeros((300, 400), bool), np.zeros((150, 400, 2), bool), np.zeros((300, 400, 1), bool)),
    "boxes": (np.zeros(4), np.zeros((2, 5)), np.array([[1, 2, 3, 4], [5, np.nan, 9, 9]]), np.ones((2, 2, 4))),
    "class_ids": (np.array([1]),),
    "scores": (np.array([0.5]), [0.5, 0.5, 0.5]),
    "captions": (["one"],),
    "colors": ([(1, 0, 0)],),
    "image": (GREY / 255.0, GREY[:, :, :2], GREY.transpose(2, 0, 1), GREY[0, 0], GREY.astype(np.int64)),
}


def test_display_functions_name_the_argument_that_does_not_match() -> None:
    top = {"mask": ODD["masks"], "image": ODD["image"], "limit": (-1,)}
    for function, arguments, odd in ((display_instances, MATTERPORT, ODD), (display_top_masks, TOP, top)):
        for name, value in ((name, value) for name, values in odd.items() for value in values):
            with pytest.raises(ValueError, match=rf"^{name}(\[1\])? (has|is) [^\n]*: it must be"):
                function(**{**arguments, name: value})


def test_display_top_masks_shows_the_largest_classes_first() -> None:
    picture = np.asarray(display_top_masks(**TOP, limit=3))
    width = (picture.shape[1] - 3 * 8) // 4
    panes = [picture[26:, n * (width + 8) : n * (width + 8) + width] for n in range(4)]
    np.testing.assert_array_equal(panes[0], GREY)
    for pane, number, place in ((panes[1], 1, (150, 200)), (panes[2], 2, (25, 60))):  # 6400 pixels, then 3000
        np.testing.assert_array_equal(pane[place], class_colour(number))
        assert (pane.any(axis=2) == MASKS[:, :, number - 1]).all()
    assert not panes[3].any()
    pane = np.asarray(display_top_masks(GREY, MASKS, np.array([1, 1]), NAMES, limit=1))[26:, 408:]
    assert 0 < pane[150, 200].max() < pane[25, 60].max()  # each instance has its shade
    large = display_top_masks(np.zeros((1000, 2000, 3), np.uint8), np.zeros((1000, 2000, 0)), np.zeros(0, int), NAMES)
    assert large.size == (5 * 480 + 4 * 8, 240 + 26)


def test_the_arguments_are_those_of_matterport() -> None:
    """Names, order and defaults, which calls by position rely on."""
    wanted = "image boxes masks class_ids class_names scores title figsize ax show_mask show_bbox colors captions"
    assert " ".join(inspect.signature(display_instances).parameters) == wanted
    assert display_instances.__defaults__ == (None, "", (16, 16), None, True, True, None, None)
    assert " ".join(inspect.signature(display_top_masks).parameters) == "image mask class_ids class_names limit"
    assert display_top_masks.__defaults__ == (4,)


@pytest.mark.parametrize("kernel", [None, object()])
def test_only_a_notebook_displays_the_picture(kernel: object, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    shell = SimpleNamespace(kernel=kernel)
    ipython: Any = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(display=shown.append))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    picture = display_instances(**MATTERPORT)
    assert shown == ([picture] if kernel is not None else [])


# sRGB to XYZ (IEC 61966-2-1), and what readers without one kind of cones see, in linear RGB: Machado, Oliveira and
# Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009, severity 1.
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def lab(colour: tuple[int, int, int], vision: np.ndarray) -> np.ndarray:
    value = np.array(colour) / 255
    linear = vision @ np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(XYZ @ linear.clip(0, 1) / (0.95047, 1, 1.08883))  # no colour is dark enough for the linear part
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def ciede2000(one: Any, two: Any) -> float:
    """Sharma, Wu and Dalal, "The CIEDE2000 Color-Difference Formula", 2005."""
    (l1, a1, b1), (l2, a2, b2) = one, two
    bend = 0.5 * (1 - math.sqrt(1 / (1 + (50 / (math.hypot(a1, b1) + math.hypot(a2, b2))) ** 7)))
    a1, a2 = (1 + bend) * a1, (1 + bend) * a2
    c1, c2 = math.hypot(a1, b1), math.hypot(a2, b2)
    h1, h2 = math.degrees(math.atan2(b1, a1)) % 360, math.degrees(math.atan2(b2, a2)) % 360
    turn = (h2 - h1 + 180) % 360 - 180
    hue, chroma, light = (h1 + turn / 2) % 360, (c1 + c2) / 2, (l1 + l2) / 2 - 50
    cosines = zip((-0.17, 0.24, 0.32, -0.2), (1, 2, 3, 4), (-30, 0, 6, -63))
    t = 1 + sum(weight * math.cos(math.radians(factor * hue + shift)) for weight, factor, shift in cosines)
    dl = (l2 - l1) / (1 + 0.015 * light**2 / math.sqrt(20 + light**2))
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    rotation = (
        2 * math.sqrt(1 / (1 + (25 / chroma) ** 7)) * math.sin(math.radians(60 * math.exp(-(((hue - 275) / 25) ** 2))))
    )
    return math.sqrt(dl**2 + dc**2 + dh**2 - rotation * dc * dh)


def test_the_colours_of_twelve_classes_and_of_outcomes_differ_for_colour_blind_readers_too() -> None:
    for one, two, published in (
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((50, 2.5, 0), (58, 24, 15), 19.4535),
    ):
        assert ciede2000(one, two) == pytest.approx(published, abs=1e-4)
    classes, outcomes = [class_colour(number) for number in range(1, 13)], [FOUND, MISSED, SUPERFLUOUS, UNCOUNTED]
    for vision, colours in itertools.product(VISION.values(), (classes, outcomes)):
        seen = [lab(colour, vision) for colour in colours]
        assert min(ciede2000(*pair) for pair in itertools.combinations(seen, 2)) >= 20
