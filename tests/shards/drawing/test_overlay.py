import inspect
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shards.drawing.overlay import (
    PALETTE,
    class_colour,
    display_instances,
    display_top_masks,
    draw_instances,
    legible_scale,
)
from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance

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
    with pytest.raises(ValueError, match="scores has a length of 1: it must be 2"):
        drawn(boxed(), boxed(), scores=[0.5])
    with pytest.raises(ValueError, match="a mask is 10x10, the picture 400x300"):
        drawn(Instance(1, (0.0, 0.0, 5.0, 5.0), rle.encode(np.ones((10, 10)))))


def test_an_empty_mask_and_an_unknown_class() -> None:
    empty = Instance(9, (10.0, 200.0, 50.0, 50.0), rle.encode(np.zeros((300, 400))))
    assert changed(drawn(empty)).any()


def test_drawing_needs_no_torch() -> None:
    code = "import sys, shards.drawing.overlay; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_drawn_can_be_chosen() -> None:
    both, masks, boxes = (
        changed(drawn(boxed(mask=True), **options)) for options in ({}, {"show_boxes": False}, {"show_masks": False})
    )
    assert both[150, 150]
    assert not masks[150, 150]
    assert boxes[100:200, 150].all()  # solid: there is a mask, though it is not shown
    assert masks[150, 200]
    assert not boxes[150, 200]
    own = drawn(boxed(mask=True), colours=[(10, 250, 10)], captions=[""])
    assert own[150, 150].tolist() == [10, 250, 10]
    with pytest.raises(ValueError, match="captions has a length of 1: it must be 2"):
        drawn(boxed(), boxed(), captions=["one"])


NAMES = ("BG", "Person", "Car")


def arrays() -> dict[str, NDArray[np.generic]]:
    """A person at rows 110 to 189 and columns 160 to 239, and a car at rows 10 to 39 and columns 20 to 119."""
    masks = np.zeros((300, 400, 2), bool)
    masks[110:190, 160:240, 0] = True
    masks[10:40, 20:120, 1] = True
    return {
        "boxes": np.array([[110, 160, 190, 240], [10, 20, 40, 120]]),
        "masks": masks,
        "class_ids": np.array([1, 2]),
    }


def test_display_instances_takes_matterports_arrays() -> None:
    a = arrays()
    picture = np.asarray(display_instances(GREY, a["boxes"], a["masks"], a["class_ids"], NAMES, np.array([0.9, 0.8])))
    expected = draw_instances(
        GREY,
        [
            Instance(1, (160.0, 110.0, 80.0, 80.0), rle.encode(a["masks"][:, :, 0])),
            Instance(2, (20.0, 10.0, 100.0, 30.0), rle.encode(a["masks"][:, :, 1])),
        ],
        CATEGORIES,
        scores=[0.9, 0.8],
    )
    np.testing.assert_array_equal(picture, np.asarray(expected))
    # y before x: the car is wide and lies at the top left.
    np.testing.assert_array_equal(picture[39, 20:120], np.tile(np.array(class_colour(2), np.uint8), (100, 1)))


def test_display_instances_leaves_out_what_matterport_does() -> None:
    a = arrays()
    a["boxes"][1] = 0  # type: ignore[index]
    bare = changed(np.asarray(display_instances(GREY, **a, class_names=NAMES, scores=np.ones(2))))  # type: ignore[arg-type]
    assert not bare[:70].any()
    assert bare[150, 200]
    nothing = display_instances(GREY, np.zeros((0, 4)), np.zeros((300, 400, 0)), np.zeros(0, int), NAMES)
    np.testing.assert_array_equal(np.asarray(nothing), GREY)
    options = {"show_mask": False, "show_bbox": False, "captions": ["a", "b"], "colors": [(0, 1, 0), (1, 0, 0)]}
    plates = np.asarray(display_instances(GREY, **arrays(), class_names=NAMES, **options))  # type: ignore[arg-type]
    assert (plates[80:110, 160:240] == (0, 255, 0)).all(axis=2).any()
    assert not changed(plates)[115:].any()
    titled = display_instances(GREY, **arrays(), class_names=NAMES, title="A street")  # type: ignore[arg-type]
    assert (titled.width, titled.height > 300) == (400, True)


ODD = {
    "masks": (None, np.zeros((300, 400), bool), np.zeros((150, 400, 2), bool), np.zeros((300, 400, 1), bool)),
    "boxes": (np.zeros(4), np.zeros((2, 5)), np.array([[1, 2, 3, 4], [5, np.nan, 9, 9]]), np.ones((2, 2, 4))),
    "class_ids": (np.array([1]),),
    "scores": (np.array([0.5]), [0.5, 0.5, 0.5]),
    "captions": (["one"],),
    "colors": ([(1, 0, 0)],),
    "image": (GREY / 255.0, GREY[:, :, :2], GREY.transpose(2, 0, 1), GREY[0, 0], GREY.astype(np.int64)),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ODD.items() for value in values])
def test_display_instances_names_the_argument_that_does_not_fit(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}(\[1\])? (has|is) [^\n]*: it must be"):
        display_instances(**{"image": GREY, **arrays(), "class_names": NAMES, name: value})  # type: ignore[arg-type]


def test_display_top_masks_names_the_argument_that_does_not_fit() -> None:
    right = {"image": GREY, "mask": arrays()["masks"], "class_ids": np.array([1, 2]), "class_names": NAMES}
    odd = [("mask", value) for value in ODD["masks"]] + [("image", value) for value in ODD["image"]] + [("limit", -1)]
    for name, value in odd:
        with pytest.raises(ValueError, match=rf"^{name} (has|is) [^\n]*: it must be"):
            display_top_masks(**{**right, name: value})  # type: ignore[arg-type]


def test_grey_images_are_drawn_on_as_well() -> None:
    expected = np.asarray(display_instances(GREY, **arrays(), class_names=NAMES))  # type: ignore[arg-type]
    for image in (GREY[:, :, 0], GREY[:, :, :1]):
        picture = display_instances(image, **arrays(), class_names=NAMES)  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.asarray(picture), expected)
        display_top_masks(image, arrays()["masks"], np.array([1, 2]), NAMES)  # type: ignore[arg-type]


def test_display_top_masks_shows_the_largest_classes_first() -> None:
    a = arrays()
    picture = np.asarray(display_top_masks(GREY, a["masks"], a["class_ids"], NAMES, limit=3))
    width = (picture.shape[1] - 3 * 8) // 4
    panes = [picture[26:, n * (width + 8) : n * (width + 8) + width] for n in range(4)]
    np.testing.assert_array_equal(panes[0], GREY)
    for pane, number, place in ((panes[1], 1, (150, 200)), (panes[2], 2, (25, 60))):  # 6400 pixels, then 3000
        np.testing.assert_array_equal(pane[place], class_colour(number))
        assert (pane.any(axis=2) == a["masks"][:, :, number - 1]).all()
    assert not panes[3].any()


def test_instances_of_a_class_differ_in_shade_and_large_images_are_made_smaller() -> None:
    a = arrays()
    pane = np.asarray(display_top_masks(GREY, a["masks"], np.array([1, 1]), NAMES, limit=1))[26:, 408:]
    assert 0 < pane[150, 200].max() < pane[25, 60].max()
    large = display_top_masks(np.zeros((1000, 2000, 3), np.uint8), np.zeros((1000, 2000, 0)), np.zeros(0, int), NAMES)
    assert large.size == (5 * 480 + 4 * 8, 240 + 26)


def test_the_arguments_are_matterports() -> None:
    """Names, order and defaults, as calls by position rely on them."""
    for function, names in (
        (
            display_instances,
            "image boxes masks class_ids class_names scores=None title='' figsize=(16,16) ax=None "
            "show_mask=True show_bbox=True colors=None captions=None",
        ),
        (display_top_masks, "image mask class_ids class_names limit=4"),
    ):
        told = []
        for one in inspect.signature(function).parameters.values():
            assert one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            told.append(one.name if one.default is one.empty else f"{one.name}={one.default!r}".replace(" ", ""))
        assert " ".join(told) == names


def test_display_instances_into_axes() -> None:
    from matplotlib.figure import Figure

    figure = Figure((4, 3))
    axes = figure.subplots(1)
    picture = display_instances(GREY, **arrays(), class_names=NAMES, title="A street", figsize=(8, 8), ax=axes)  # type: ignore[arg-type]
    assert picture.size == (400, 300)
    np.testing.assert_array_equal(axes.get_images()[0].get_array(), np.asarray(picture))
    assert (axes.get_title(), axes.axison) == ("A street", False)


@pytest.mark.parametrize("kernel", [None, object()])
def test_pictures_are_shown_in_a_notebook_only(kernel: object, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    shell = SimpleNamespace(kernel=kernel)
    ipython = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(display=shown.append))
    monkeypatch.setitem(sys.modules, "IPython", ipython)  # type: ignore[arg-type]
    picture = display_instances(GREY, **arrays(), class_names=NAMES)  # type: ignore[arg-type]
    assert shown == ([picture] if kernel is not None else [])
