"""The PNGs that mask zips hold: one bit a pixel, grey, not interlaced; read without leaving that form.

Pillow spends six times as long on such a picture as zlib does, most of it on making a byte of every bit of pictures
that are then sampled down. Here rows stay packed; only what lies in the object's extent and in the sampling grid is
ever unpacked. Whatever is not of this form, or not flawless, is left to Pillow: it reads it or says what is wrong.

Format: https://www.w3.org/TR/png-3 (5 datastream structure, 9 filtering, 11.2.1 IHDR).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IHDR = struct.Struct(">IIBBBBB")
_PLAIN = (1, 0, 0, 0, 0)  # bits a pixel, colour type, compression, filter method, interlace
_SUB, _UP, _AVERAGE, _PAETH = 1, 2, 3, 4


@dataclass(frozen=True)
class BitImage:
    """A picture of bits.

    Attributes:
        width, height: in pixels.
        rows: uint8 (height, ceil(width / 8)), the first pixel in the highest bit; unused bits at a row's end are 0.
    """

    width: int
    height: int
    rows: NDArray[np.uint8]

    @cached_property
    def extent(self) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) of the pixels that are set, the last two exclusive; None for none."""
        filled = np.flatnonzero(self.rows.max(axis=1))
        if not len(filled):
            return None
        top, bottom = int(filled[0]), int(filled[-1]) + 1
        columns = np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(self.rows[top:bottom], axis=0)))
        return int(columns[0]), top, int(columns[-1]) + 1, bottom

    def resized(self, width: int, height: int) -> tuple[NDArray[np.uint8], int, int] | None:
        """What Pillow's `resize(..., NEAREST)` makes of it, as far as there may be pixels that are set.

        Returns:
            uint8 (h, w) of 0 and 1, and the place (left, top) of its corner; outside of it all is 0. None where no
            pixel that is set falls on the grid.
        """
        if self.extent is None:
            return None
        left, top, right, bottom = self.extent
        columns, rows = sampled(self.width, width), sampled(self.height, height)
        x1, x2 = np.searchsorted(columns, (left, right))
        y1, y2 = np.searchsorted(rows, (top, bottom))
        if x1 == x2 or y1 == y2:
            return None
        first, last = int(columns[x1]) // 8, int(columns[x2 - 1]) // 8 + 1
        bits = np.unpackbits(self.rows[rows[y1:y2], first:last], axis=1)
        return bits[:, columns[x1:x2] - 8 * first], int(x1), int(y1)


def read_bits(data: bytes, most_pixels: int) -> BitImage | None:
    """A PNG of one grey bit a pixel; None where it is another one, has more than `most_pixels`, or has a flaw."""
    pieces = _pieces(data)
    if pieces is None:
        return None
    width, height, packed = pieces
    if width * height > most_pixels:
        return None
    stride = (width + 7) // 8
    expected = height * (stride + 1)
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(packed, expected + 1)
    except zlib.error:
        return None
    if len(raw) != expected or not inflater.eof:
        return None
    lines = np.frombuffer(raw, np.uint8).reshape(height, stride + 1)
    kinds = lines[:, 0]
    if kinds.max() > _PAETH:
        return None
    rows = _unfiltered(kinds, lines[:, 1:])
    if width % 8:
        rows[:, -1] &= (0xFF00 >> width % 8) & 0xFF
    return BitImage(width, height, rows)


@lru_cache(maxsize=256)
def sampled(source: int, target: int) -> NDArray[np.int64]:
    """(target,) the pixel of a line of `source` pixels that Pillow's NEAREST takes for each pixel; ascending."""
    ramp = Image.fromarray(np.arange(source, dtype=np.int32)[None])
    taken: NDArray[np.int64] = np.asarray(ramp.resize((target, 1), Image.Resampling.NEAREST), dtype=np.int64)[0]
    taken.flags.writeable = False
    return taken


def _pieces(data: bytes) -> tuple[int, int, bytes] | None:
    """Width, height and the compressed pixels, of a file that holds nothing else."""
    if not data.startswith(_SIGNATURE):
        return None
    position, size, packed = len(_SIGNATURE), (0, 0), []
    while True:
        head = data[position : position + 8]
        if len(head) < 8:
            return None
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        body = data[position + 8 : position + 8 + length]
        check = data[position + 8 + length : position + 12 + length]
        if len(check) < 4 or zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(check, "big"):
            return None
        position += 12 + length
        if kind == b"IDAT" and size[0]:
            packed.append(body)
        elif kind == b"IHDR" and not size[0] and length == _IHDR.size:
            width, height, *form = _IHDR.unpack(body)
            if tuple(form) != _PLAIN or not (width and height):
                return None
            size = width, height
        elif kind == b"IEND" and packed:
            return *size, b"".join(packed)
        else:
            return None


def _unfiltered(kinds: NDArray[np.uint8], lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo the filters; a pixel is less than a byte, so that the byte to the left takes its place (9.2)."""
    rows = lines.copy()
    own = kinds == _SUB  # filters of a row alone; the others lean on the row above, in order
    rows[own] = np.add.accumulate(rows[own], axis=1, dtype=np.uint8)
    leaning = np.flatnonzero(kinds > _SUB)
    starts = np.flatnonzero(np.diff(kinds[leaning], prepend=0) | (np.diff(leaning, prepend=-2) != 1))
    for start, end in zip(starts, [*starts[1:], len(leaning)]):
        first, last = int(leaning[start]), int(leaning[end - 1]) + 1
        if kinds[first] == _UP:
            block = rows[max(0, first - 1) : last]  # from the row above on, if there is one
            np.add.accumulate(block, axis=0, dtype=np.uint8, out=block)
            continue
        for number in range(first, last):
            above = rows[number - 1] if number else np.zeros_like(rows[0])
            rows[number] = _predicted(int(kinds[number]), rows[number].tolist(), above.tolist())
    return rows


def _predicted(kind: int, line: list[int], above: list[int]) -> list[int]:
    """A row filtered by _AVERAGE or _PAETH: each byte needs the one before it."""
    left = upper_left = 0
    out = []
    for value, upper in zip(line, above):
        if kind == _AVERAGE:
            guess = (left + upper) // 2
        else:
            to_left, to_upper = abs(upper - upper_left), abs(left - upper_left)
            to_upper_left = abs(left + upper - 2 * upper_left)
            if to_left <= to_upper and to_left <= to_upper_left:
                guess = left
            else:
                guess = upper if to_upper <= to_upper_left else upper_left
        left = (value + guess) & 0xFF
        out.append(left)
        upper_left = upper
    return out
