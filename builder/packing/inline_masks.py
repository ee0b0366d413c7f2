"""Encode masks that the annotations themselves contain: COCO's polygons and run lengths.

Format: https://cocodataset.org/#format-data. pycocotools rasterises polygons and encodes runs. Its C code trusts every
number, so all input is checked first: a run or corner far outside the image would write or allocate out of bounds.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from builder.packing.images import MAX_PIXELS, same_shape
from builder.tasks.plan import Failure, InlineMask
from shards.format import rle
from shards.format.accounts import PARTS_LEFT_OUT

MAX_CORNERS = 1 << 20  # of a polygon; thousands are common, more than this is damage
FARTHEST = 1e9  # pixels; a coordinate further away is damage


@dataclass(frozen=True, slots=True)
class EncodedMask:
    """A mask, and a remark on it for its account; "" without one."""

    mask: rle.Rle
    remark: str = ""


def encode_inline(place: InlineMask, width: int, height: int) -> EncodedMask | Failure:
    """Encode a mask of the annotations at the size of its image in pixels; they may be made for another size.

    Parts that are no polygons, such as a point next to the outline, are left out with a remark. Polygons are clipped.
    """
    size = (place.width, place.height)
    if min(size) <= 0 or size[0] * size[1] > MAX_PIXELS:
        return Failure("mask-undecodable", f"{size[0]}x{size[1]} pixels, the limit is {MAX_PIXELS}")
    if not same_shape(size, (width, height)):
        return Failure("mask-shape", f"the mask is {size[0]}x{size[1]}, the image {width}x{height}")
    try:
        segmentation = json.loads(place.segmentation)
        encode = _encode_polygons if isinstance(segmentation, list) else _encode_runs
        encoded = encode(segmentation, *size)
    except (ValueError, RecursionError) as error:
        return Failure("mask-undecodable", str(error))
    if size != (width, height) and rle.area(encoded.mask):
        pixels = Image.fromarray(rle.decode(encoded.mask)).resize((width, height), Image.Resampling.NEAREST)
        encoded = replace(encoded, mask=rle.encode(np.asarray(pixels)))
    return encoded if rle.area(encoded.mask) else Failure("mask-empty", "no pixel is set")


def _encode_polygons(parts: list[Any], width: int, height: int) -> EncodedMask:
    polygons, faults = [], []
    for part in parts:
        try:
            polygons.append(_corners(part, width, height))
        except ValueError as fault:
            faults.append(fault)
    if not polygons:
        raise faults[0] if faults else ValueError("no polygon")
    merged = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    mask = rle.Rle(height, width, merged["counts"].decode("ascii"))
    return EncodedMask(mask, PARTS_LEFT_OUT if faults else "")


def _encode_runs(segmentation: Any, width: int, height: int) -> EncodedMask:
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        raise ValueError(f"neither polygons nor an RLE of {width}x{height} pixels")
    counts = segmentation.get("counts")
    runs = rle.runs(rle.Rle(height, width, counts)).tolist() if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(map(_is_length, runs)):
        raise ValueError("its runs are not lengths")
    runs = list(map(int, runs))  # some writers have 20.0
    if sum(runs) != width * height:
        raise ValueError(f"its runs do not add up to {width}x{height} pixels")
    # A compressed string is encoded again, because other writers may encode the same mask differently.
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return EncodedMask(rle.Rle(height, width, encoded["counts"].decode("ascii")))


def _is_length(run: Any) -> bool:
    return type(run) in (int, float) and 0 <= run <= MAX_PIXELS and run == int(run)


def _corners(part: Any, width: int, height: int) -> list[float]:
    """Return x, y, x, y, ... of at least three corners, none further outside than the longer side of the image."""
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2 or len(part) > 2 * MAX_CORNERS:
        raise ValueError("a polygon is not a list of three or more corners")
    for value in part:
        if type(value) not in (int, float) or not abs(value) <= FARTHEST:  # False for NaN, too
            raise ValueError(f"a polygon has the corner {str(value)[:40]!r}, which is no coordinate")
    reach = max(width, height)
    corners = [(float(x), float(y)) for x, y in zip(part[::2], part[1::2], strict=True)]
    if not all(-reach <= value <= 2 * reach for value in part):
        corners = _clipped(corners, -reach, 2 * reach)
    if not corners:
        raise ValueError("a polygon is far outside the image")
    return [value for corner in corners for value in corner]


def _clipped(corners: list[tuple[float, float]], low: float, high: float) -> list[tuple[float, float]]:
    """Return the part of a polygon that is in a square, `low` to `high` on both axes (Sutherland and Hodgman)."""
    for axis, limit, sign in ((0, low, 1), (0, high, -1), (1, low, 1), (1, high, -1)):
        kept: list[tuple[float, float]] = []
        for start, end in zip([*corners[-1:], *corners[:-1]], corners, strict=True):
            inside = [sign * (corner[axis] - limit) >= 0 for corner in (start, end)]
            if inside[0] != inside[1]:
                share = (limit - start[axis]) / (end[axis] - start[axis])
                crossing = [begin + share * (stop - begin) for begin, stop in zip(start, end, strict=True)]
                crossing[axis] = limit
                kept.append((crossing[0], crossing[1]))
            if inside[1]:
                kept.append(end)
        corners = kept
    return corners
