"""COCO's run-length encoding of binary masks, with pycocotools.

Format: `maskApi.c` of https://github.com/cocodataset/cocoapi. The runs are column-major and start with a run of zeros;
they are stored as a compressed ASCII string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask


@dataclass(frozen=True, slots=True)
class Rle:
    """A binary mask of the image's height and width in pixels, as COCO's compressed runs (ASCII)."""

    height: int
    width: int
    counts: str = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return COCO's form: `{"size": [height, width], "counts": "..."}`."""
        return {"size": [self.height, self.width], "counts": self.counts}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Rle:
        """Parse what `to_json` returns; KeyError, TypeError or ValueError if `value` has another form."""
        (height, width), counts = value["size"], value["counts"]
        if not isinstance(counts, str):
            raise TypeError(f"counts is {type(counts).__name__}, not a compressed RLE string")
        return cls(int(height), int(width), counts)

    def to_coco(self) -> dict[str, Any]:
        """Return the form that pycocotools' functions take (counts as bytes)."""
        return {"size": [self.height, self.width], "counts": self.counts.encode("ascii")}


def encode(mask: NDArray[Any]) -> Rle:
    """Encode a mask [H, W] of any dtype; non-zero is the object."""
    height, width = mask.shape
    encoded = coco_mask.encode(np.asfortranarray(mask != 0).view(np.uint8))
    return Rle(height, width, encoded["counts"].decode("ascii"))


def encode_part(bits: NDArray[np.uint8], left: int, top: int, height: int, width: int) -> Rle:
    """Encode a mask of the given height and width that is 0 outside of a part of it.

    The part is `bits`, uint8 [h, w] of 0 and 1, h and w at least 1; its first column and row are `left` and `top`.
    """
    part_height, part_width = bits.shape
    # The columns of the part, flattened, with a background pixel at either end, so that every change is inside.
    flat = np.zeros(part_width * height + 2, np.uint8)
    flat[1:-1].reshape(part_width, height)[:, top : top + part_height] = bits.T
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + left * height
    runs = np.diff(changes, prepend=0, append=height * width)
    if not runs[-1]:
        runs = runs[:-1]
    [encoded] = coco_mask.frPyObjects([{"size": [height, width], "counts": runs.tolist()}], height, width)
    return Rle(height, width, encoded["counts"].decode("ascii"))


def decode(rle: Rle) -> NDArray[np.uint8]:
    """Decode to uint8 [H, W], values 0 and 1."""
    mask: NDArray[np.uint8] = coco_mask.decode(rle.to_coco())
    return mask


def area(rle: Rle) -> int:
    """Return the number of object pixels."""
    return int(coco_mask.area(rle.to_coco()))


def bounds(rle: Rle) -> tuple[float, float, float, float]:
    """Return the tight box (x, y, w, h) in pixels; w and h are 0 for an empty mask."""
    x, y, w, h = coco_mask.toBbox(rle.to_coco())
    return float(x), float(y), float(w), float(h)


def runs(rle: Rle) -> NDArray[np.int64]:
    """Return the lengths of a mask's runs, the first of zeros; they are not checked against its size.

    Unlike pycocotools, it raises a ValueError if `counts` is not a compressed RLE.
    """
    numbers, _ = _numbers(rle.counts)
    return _undo_differences(numbers)


def fault(rle: Rle, width: int, height: int) -> str:
    """Return why a mask must not reach pycocotools, which checks nothing, in an image of that size; "" if it may."""
    if (rle.width, rle.height) != (width, height):
        return f"the RLE is of {rle.width}x{rle.height}, the image {width}x{height}"
    try:
        lengths = runs(rle)
    except ValueError as error:
        return f"the RLE cannot be decoded: {error}"
    if (len(lengths) and lengths.min() < 0) or lengths.sum() != width * height:
        return f"the RLE has runs of {lengths.sum()} pixels, the image {width * height}"
    return ""


def all_valid(masks: Sequence[Rle], width: int, height: int) -> bool:
    """Return whether no mask of an image has a `fault`: all of them at once, because every sample that is read pays."""
    if not masks:
        return True
    if any((mask.width, mask.height) != (width, height) or not mask.counts for mask in masks):
        return False
    try:
        numbers, ends = _numbers("".join(mask.counts for mask in masks))
    except ValueError:
        return False
    # The place of each mask's last character, which must be the last of a number.
    last = np.cumsum([len(mask.counts) for mask in masks]) - 1
    stops = np.searchsorted(ends, last)
    if not np.array_equal(ends[stops], last):
        return False
    starts = np.concatenate(([0], stops[:-1] + 1))
    for start, stop in zip(starts.tolist(), stops.tolist()):
        _undo_differences(numbers[start : stop + 1])
    return bool(numbers.min() >= 0) and bool((np.add.reduceat(numbers, starts) == width * height).all())


def _numbers(counts: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers in compressed runs, and the place of the last character of each; ValueError for other text."""
    codes = np.frombuffer(counts.encode("ascii"), dtype=np.uint8) - np.uint8(48)
    if not len(codes):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # Six bits per character: five of a number, lowest first, and one that is set if more characters follow.
    if codes.max() > 63 or codes[-1] & 32:
        raise ValueError("not a compressed RLE")
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    longest = int(lengths.max())
    if longest > 7:
        raise ValueError("not a compressed RLE: a run of more than 32 bits")
    numbers = (codes[starts] & 31).astype(np.int64)
    for digit in range(1, longest):  # few runs have many digits
        longer = np.flatnonzero(lengths > digit)
        numbers[longer] += (codes[starts[longer] + digit] & 31).astype(np.int64) << (5 * digit)
    negative = np.flatnonzero(codes[ends] & 16)  # bit 4 of the last character is the sign
    numbers[negative] -= 1 << (5 * lengths[negative])
    return numbers, ends


def _undo_differences(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Turn the numbers of one mask into its runs, in place.

    From the fourth run on, each is stored as the difference to the previous run of the same value.
    """
    np.cumsum(numbers[1::2], out=numbers[1::2])
    np.cumsum(numbers[2::2], out=numbers[2::2])
    return numbers
