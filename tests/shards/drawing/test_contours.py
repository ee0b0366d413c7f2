import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from shards.drawing.contours import contours, joined, simplify, svg_path

Mask = NDArray[np.bool_]


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(bits).reshape(height, width)


def filled(rings: list[NDArray[np.int64]], height: int, width: int) -> Mask:
    """Fill by the even-odd rule at the centres of pixels: each vertical edge inverts the pixels on its right."""
    mask = np.zeros((height, width), bool)
    for ring in rings:
        for (x, y), (next_x, next_y) in zip(ring, np.roll(ring, -1, axis=0)):
            if x == next_x:
                mask[min(y, next_y) : max(y, next_y), x:] ^= True
    return mask


@given(masks())
def test_contours_fill_exactly_the_mask_and_turn_at_every_point(mask: Mask) -> None:
    rings = contours(mask)
    assert np.array_equal(filled(rings, *mask.shape), mask)
    for ring in rings:
        steps = np.sign(np.roll(ring, -1, axis=0) - ring)
        assert (np.abs(steps).sum(axis=1) == 1).all()  # along the edges of pixels
        assert (steps * np.roll(steps, 1, axis=0) == 0).all()


@given(masks().filter(np.any))
def test_joined_contours_fill_the_same(mask: Mask) -> None:
    whole = joined(contours(mask))
    assert np.array_equal(filled([whole], *mask.shape), mask)
    assert {tuple(point) for point in whole} == {tuple(point) for ring in contours(mask) for point in ring}


def disc(radius: int) -> Mask:
    y, x = np.mgrid[-radius - 1 : radius + 2, -radius - 1 : radius + 2]
    return np.asarray(x * x + y * y <= radius * radius)


def test_simplify_keeps_the_shape_with_few_points() -> None:
    mask = disc(150)
    [ring] = contours(mask)
    few = simplify(ring, 1.0)
    assert len(few) < len(ring) / 5
    picture = Image.new("1", mask.shape[::-1])
    ImageDraw.Draw(picture).polygon([(x - 0.5, y - 0.5) for x, y in few.tolist()], fill=1)
    drawn = np.asarray(picture)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.985
    for smallest in (np.ones((1, 1), bool), np.ones((1, 9), bool), disc(1)):
        assert all(len(simplify(ring, 8.0)) >= 3 for ring in contours(smallest))


def test_svg_path_has_relative_steps() -> None:
    mask = np.zeros((5, 6), bool)
    mask[1:4, 2:5] = True
    mask[2, 3] = False
    outer, hole = contours(mask)
    assert svg_path([outer]) == "M2 1l3 0 0 3-3 0z"
    both = svg_path([outer, hole])
    assert both.count("M") == both.count("z") == 2
    assert re.fullmatch(r"[Mlz0-9 -]+", both)
    assert svg_path([outer[:2]]) == "" == svg_path([])
