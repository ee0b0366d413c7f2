import json
import math
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from builder.packing.inline_masks import EncodedMask, encode_inline
from builder.tasks.plan import Failure, InlineMask
from shards.format import rle
from shards.format.accounts import PARTS_LEFT_OUT

masks = arrays.arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=st.integers(0, 1))


def runs_of(mask: np.ndarray) -> list[int]:
    """Uncompressed RLE: column-major runs, of which the first is of zeros."""
    runs = [(value, len(list(same))) for value, same in groupby(mask.flatten(order="F").tolist())]
    return [0] * (runs[0][0] == 1) + [length for _, length in runs]


def encoded(segmentation: object, width: int, height: int) -> EncodedMask | Failure:
    return encode_inline(InlineMask(width, height, json.dumps(segmentation)), width, height)


@given(masks)
def test_compressed_and_uncompressed_run_lengths_give_the_mask(mask: np.ndarray) -> None:
    height, width = mask.shape
    for counts in (rle.encode(mask).counts, runs_of(mask)):
        found = encoded({"size": [height, width], "counts": counts}, width, height)
        assert found == (EncodedMask(rle.encode(mask)) if mask.any() else Failure("mask-empty", "no pixel is set"))


corner = st.floats(-10, 60, allow_nan=False)


@given(st.lists(st.lists(st.tuples(corner, corner), min_size=3, max_size=7), min_size=1, max_size=3))
def test_polygons_are_rasterised_as_by_pycocotools(polygons: list[list[tuple[float, float]]]) -> None:
    flat = [[value for point in polygon for value in point] for polygon in polygons]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, 40, 50)))
    found = encoded(flat, 50, 40)
    assert isinstance(found, EncodedMask) == expected.any()
    assert not isinstance(found, EncodedMask) or (rle.decode(found.mask) == expected).all()


@given(st.text(alphabet=st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_any_string_of_counts_is_a_mask_or_a_failure(counts: str) -> None:
    found = encoded({"size": [4, 6], "counts": counts}, 6, 4)
    assert isinstance(found, Failure) or rle.decode(found.mask).shape == (4, 6)


def rasterised(polygons: list, height: int, width: int) -> np.ndarray:
    mask: np.ndarray = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
    return mask


STRAY = [[32.0, 24.0], [26.0, 31.0, 50.0, 31.0], [], [1, 2, 3, 4, 5, 6, 7], None, "x", [1, 1, 5, math.nan, 5, 5]]
STRAY += [[1, 1, 5, 1, 5, 10**400], [1e12, 0, 1e12, 1, 2e12, 1], [[1, 1], [5, 1], [5, 5]]]
OUTLINE = [10, 10, 30, 10, 30, 30, 10, 30]


@pytest.mark.parametrize("part", STRAY)
def test_stray_parts_are_left_out_and_the_polygons_kept(part: object) -> None:
    for parts in ([OUTLINE, part], [part, OUTLINE], [part, OUTLINE, part]):
        found = encoded(parts, 64, 48)
        assert isinstance(found, EncodedMask)
        assert (rle.area(found.mask), found.remark) == (400, PARTS_LEFT_OUT)
    assert isinstance(encoded([part], 64, 48), Failure)


def test_polygons_far_outside_the_image_are_clipped() -> None:
    for far in (1e3, 1e5, 9e8):
        found = encoded([[10, 12, far, 12, far, 40, 10, 40]], 64, 48)
        assert isinstance(found, EncodedMask)
        assert (rle.area(found.mask), found.remark) == (54 * 28, "")
        triangle = [10, 12, 10 + far, 12 + far, 10, far]  # below the diagonal from its first corner
        found = encoded([triangle], 64, 48)
        assert isinstance(found, EncodedMask)
        near = rasterised([[10, 12, 110, 112, 10, 112]], 48, 64)
        assert np.count_nonzero(rle.decode(found.mask) != near) <= 2  # its edge is rounded elsewhere
    assert encoded([[1000, 1000, 1010, 1000, 1010, 1010]], 64, 48) == Failure(
        "mask-undecodable", "a polygon is far outside the image"
    )


def test_run_lengths_may_be_written_as_decimals() -> None:
    counts = [10.0, 5, 33.0]
    found = encoded({"size": [6, 8], "counts": counts}, 8, 6)
    assert isinstance(found, EncodedMask)
    assert found == encoded({"size": [6, 8], "counts": [10, 5, 33]}, 8, 6)
    assert isinstance(encoded({"size": [6, 8], "counts": [10.5, 5, 32.5]}, 8, 6), Failure)


SQUARE = "[[1,1,5,1,5,5,1,5]]"


DAMAGED = ["[]", "7", "[" * 100_000, "[[1,1,5,1]]", "[[1,1,5,1,5,5,1]]"]
DAMAGED += [f"[[1,1,5,1,5,{y}]]" for y in ('"x"', "true", "1e10", "NaN", "1e999", f"1{'0' * 400}")]
DAMAGED += [f'{{"size":[8,10],"counts":{counts}}}' for counts in ("[10,10]", "[-10,90]", "[0,80.5]", '"oooo"', '"é"')]
DAMAGED += ['{"size":[10,8],"counts":[0,80]}', '{"size":[8,10]}']


@pytest.mark.parametrize("segmentation", DAMAGED)
def test_damaged_segmentations_are_failures_with_a_reason(segmentation: str) -> None:
    found = encode_inline(InlineMask(10, 8, segmentation), 10, 8)
    assert isinstance(found, Failure)
    assert (found.status, bool(found.detail)) == ("mask-undecodable", True)


def test_masks_of_another_size_are_resized_and_of_another_shape_refused() -> None:
    found = encode_inline(InlineMask(10, 8, SQUARE), 20, 16)
    small = encode_inline(InlineMask(10, 8, SQUARE), 10, 8)
    assert isinstance(found, EncodedMask)
    assert isinstance(small, EncodedMask)
    assert rle.decode(found.mask).shape == (16, 20)
    assert rle.area(found.mask) == 4 * rle.area(small.mask)
    for place, status in (((100, 80), "mask-shape"), ((1 << 20, 1 << 20), "mask-undecodable")):
        refused = encode_inline(InlineMask(*place, SQUARE), 80, 100)
        assert isinstance(refused, Failure)
        assert refused.status == status
