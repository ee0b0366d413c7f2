import json
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from builder.packing.inline_masks import encode_inline
from builder.tasks.plan import Failure, InlineMask
from shards.format import rle

masks = arrays.arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=st.integers(0, 1))


def runs_of(mask: np.ndarray) -> list[int]:
    """Uncompressed RLE: column-major runs, of which the first is of zeros."""
    runs = [(value, len(list(same))) for value, same in groupby(mask.flatten(order="F").tolist())]
    return [0] * (runs[0][0] == 1) + [length for _, length in runs]


def encoded(segmentation: object, width: int, height: int) -> rle.Rle | Failure:
    return encode_inline(InlineMask(width, height, json.dumps(segmentation)), width, height)


@given(masks)
def test_compressed_and_uncompressed_run_lengths_give_the_mask(mask: np.ndarray) -> None:
    height, width = mask.shape
    for counts in (rle.encode(mask).counts, runs_of(mask)):
        found = encoded({"size": [height, width], "counts": counts}, width, height)
        assert found == (rle.encode(mask) if mask.any() else Failure("mask-empty", "no pixel is set"))


corner = st.floats(-10, 60, allow_nan=False)


@given(st.lists(st.lists(st.tuples(corner, corner), min_size=3, max_size=7), min_size=1, max_size=3))
def test_polygons_are_rasterised_as_by_pycocotools(polygons: list[list[tuple[float, float]]]) -> None:
    flat = [[value for point in polygon for value in point] for polygon in polygons]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, 40, 50)))
    found = encoded(flat, 50, 40)
    assert isinstance(found, rle.Rle) == expected.any()
    assert not isinstance(found, rle.Rle) or (rle.decode(found) == expected).all()


@given(st.text(alphabet=st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_any_string_of_counts_is_a_mask_or_a_failure(counts: str) -> None:
    found = encoded({"size": [4, 6], "counts": counts}, 6, 4)
    assert isinstance(found, Failure) or rle.decode(found).shape == (4, 6)


SQUARE = "[[1,1,5,1,5,5,1,5]]"


DAMAGED = ["[]", "7", "[" * 100_000, "[[1,1,5,1]]", "[[1,1,5,1,5,5,1]]"]
DAMAGED += [f"[[1,1,5,1,5,{y}]]" for y in ('"x"', "true", "1e9", "NaN", "1e999", f"1{'0' * 400}")]
DAMAGED += [f'{{"size":[8,10],"counts":{counts}}}' for counts in ("[10,10]", "[-10,90]", "[0,80.0]", '"oooo"', '"é"')]
DAMAGED += ['{"size":[10,8],"counts":[0,80]}', '{"size":[8,10]}']


@pytest.mark.parametrize("segmentation", DAMAGED)
def test_damaged_segmentations_are_failures_with_a_reason(segmentation: str) -> None:
    found = encode_inline(InlineMask(10, 8, segmentation), 10, 8)
    assert isinstance(found, Failure)
    assert (found.status, bool(found.detail)) == ("mask-undecodable", True)


def test_masks_of_another_size_are_resized_and_of_another_shape_refused() -> None:
    found = encode_inline(InlineMask(10, 8, SQUARE), 20, 16)
    assert isinstance(found, rle.Rle)
    assert rle.decode(found).shape == (16, 20)
    assert rle.area(found) == 4 * rle.area(encode_inline(InlineMask(10, 8, SQUARE), 10, 8))  # type: ignore[arg-type]
    for place, status in (((100, 80), "mask-shape"), ((1 << 20, 1 << 20), "mask-undecodable")):
        refused = encode_inline(InlineMask(*place, SQUARE), 80, 100)
        assert isinstance(refused, Failure)
        assert refused.status == status
