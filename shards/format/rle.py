"""COCO's run-length encoding of binary masks, with pycocotools.

Format: `maskApi.c` of https://github.com/cocodataset/cocoapi. The runs are column-major and start with a run of zeros;
they are stored as a compressed ASCII string.
"""

from __future__ import annotations

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
    codes = np.frombuffer(rle.counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    # Six bits per character: five of a number, lowest first, and one that is set if more characters follow.
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("not a compressed RLE")
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("not a compressed RLE: a run of more than 32 bits")
    digit = np.arange(len(codes)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 31) << (5 * digit), starts)
    numbers -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)  # bit 4 of the last character is the sign
    # From the fourth run on, each is stored as the difference to the previous run of the same value.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
