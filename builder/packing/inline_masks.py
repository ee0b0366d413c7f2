"""Encode masks that the annotations themselves contain: COCO's polygons and run lengths.

Format: https://cocodataset.org/#format-data. pycocotools rasterises polygons and encodes runs. Its C code trusts every
number, so all input is checked first: a run or corner far outside the image would write or allocate out of bounds.
"""

import json
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from builder.packing.images import MAX_PIXELS, same_shape
from builder.tasks.plan import Failure, InlineMask
from shards.format import rle

MAX_CORNERS = 1 << 20  # of a polygon; thousands are common, more than this is damage


def encode_inline(place: InlineMask, width: int, height: int) -> rle.Rle | Failure:
    """Encode a mask of the annotations at the size of its image in pixels; they may be made for another size."""
    size = (place.width, place.height)
    if min(size) <= 0 or size[0] * size[1] > MAX_PIXELS:
        return Failure("mask-undecodable", f"{size[0]}x{size[1]} pixels, the limit is {MAX_PIXELS}")
    if not same_shape(size, (width, height)):
        return Failure("mask-shape", f"the mask is {size[0]}x{size[1]}, the image {width}x{height}")
    try:
        mask = _encode(json.loads(place.segmentation), *size)
    except (ValueError, RecursionError) as error:
        return Failure("mask-undecodable", str(error))
    if size != (width, height) and rle.area(mask):
        pixels = Image.fromarray(rle.decode(mask)).resize((width, height), Image.Resampling.NEAREST)
        mask = rle.encode(np.asarray(pixels))
    return mask if rle.area(mask) else Failure("mask-empty", "no pixel is set")


def _encode(segmentation: Any, width: int, height: int) -> rle.Rle:
    if isinstance(segmentation, list):
        polygons = [_corners(polygon, width, height) for polygon in segmentation]
        if not polygons:
            raise ValueError("no polygon")
        merged = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        return rle.Rle(height, width, merged["counts"].decode("ascii"))
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        raise ValueError(f"neither polygons nor an RLE of {width}x{height} pixels")
    counts = segmentation.get("counts")
    runs = rle.runs(rle.Rle(height, width, counts)).tolist() if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and 0 <= run <= MAX_PIXELS for run in runs):
        raise ValueError("its runs are not lengths")
    if sum(runs) != width * height:
        raise ValueError(f"its runs do not add up to {width}x{height} pixels")
    # A compressed string is encoded again, because other writers may encode the same mask differently.
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return rle.Rle(height, width, encoded["counts"].decode("ascii"))


def _corners(polygon: Any, width: int, height: int) -> list[float]:
    """Return x, y, x, y, ... of at least three corners, none further outside than the longer side of the image."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or len(polygon) > 2 * MAX_CORNERS:
        raise ValueError("a polygon is not a list of three or more corners")
    reach = max(width, height)
    for value in polygon:
        if type(value) not in (int, float) or not -reach <= value <= 2 * reach:  # False for NaN, too
            raise ValueError(f"a polygon has the corner {str(value)[:40]!r}, far from the image")
    return [float(value) for value in polygon]
