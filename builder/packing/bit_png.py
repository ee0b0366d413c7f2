"""Decode PNGs of one grey bit per pixel, as mask zips hold them, without unpacking the bits.

Pillow takes twice as long for a mask, most of it to expand every bit to a byte before the mask is downsampled. Here
rows stay packed, and only the pixels that are in the object's extent and on the sampling grid are unpacked. Filters 0
(none), 1 (Sub), 2 (Up) and 4 (Paeth) occur in Open Images' masks. A PNG with another filter, of another form, or with
any damage is left to Pillow, which decodes it or says what is wrong.

Format: https://www.w3.org/TR/png-3 (5 datastream structure, 9 filtering, 11.2.1 IHDR).
"""

import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from isal import igzip_lib
from isal import isal_zlib as zlib
from numpy.typing import NDArray
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IHDR = struct.Struct(">IIBBBBB")
_ONE_GREY_BIT = (1, 0, 0, 0, 0)  # bit depth, colour type, compression, filter method, interlace
_SUB, _UP, _AVERAGE, _PAETH = 1, 2, 3, 4


@dataclass(frozen=True)
class BitImage:
    """A binary image with packed rows.

    Attributes:
        width, height: in pixels.
        rows: uint8 [n, ceil(width / 8)], the first pixel in the highest bit; padding bits are 0.
        first_row: place of the first of them; all other rows of the image are 0.
    """

    width: int
    height: int
    rows: NDArray[np.uint8]
    first_row: int = 0

    @cached_property
    def extent(self) -> tuple[int, int, int, int] | None:
        """The box (left, top, right, bottom) of all set pixels, right and bottom exclusive; None without any."""
        filled = np.flatnonzero(self.rows.max(axis=1))
        if not len(filled):
            return None
        top, bottom = int(filled[0]), int(filled[-1]) + 1
        columns = np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(self.rows[top:bottom], axis=0)))
        return int(columns[0]), self.first_row + top, int(columns[-1]) + 1, self.first_row + bottom

    def resized(self, width: int, height: int) -> tuple[NDArray[np.uint8], int, int] | None:
        """Resize like Pillow's `resize(..., NEAREST)`, cropped to a box that contains all set pixels.

        Returns uint8 [h, w] of 0 and 1, and the (left, top) of its corner; None if the sampling grid has no set pixel.
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
        bits = np.unpackbits(self.rows[rows[y1:y2] - self.first_row, first:last], axis=1)  # [h, 8 * bytes]
        return bits[:, columns[x1:x2] - 8 * first], int(x1), int(y1)


def read_bits(data: bytes, max_pixels: int) -> BitImage | None:
    """Decode a PNG; None if it has another form or filter, more than `max_pixels`, or any damage."""
    chunks = _read_chunks(data)
    if chunks is None:
        return None
    width, height, compressed = chunks
    if width * height > max_pixels:
        return None
    stride = (width + 7) // 8
    expected = height * (stride + 1)
    decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_ZLIB)  # faster than decompressobj for one call
    try:
        raw = decompressor.decompress(compressed, expected + 1)
    except zlib.error:  # type: ignore[misc]  # a class, which its stub does not say
        return None
    if len(raw) != expected or not decompressor.eof:
        return None
    lines = np.frombuffer(raw, np.uint8).reshape(height, stride + 1)
    # Lines of zeros at the top and the bottom are background: most objects fill a part of the image's height.
    written = np.flatnonzero(np.bitwise_or.reduce(lines, axis=1))
    first, last = (int(written[0]), int(written[-1]) + 1) if len(written) else (0, 0)
    filters = lines[first:last, 0]
    if (filters > _PAETH).any() or (filters == _AVERAGE).any():
        return None
    rows = _unfilter(filters, lines[first:last, 1:])
    if width % 8:
        rows[:, -1] &= (0xFF00 >> width % 8) & 0xFF
    return BitImage(width, height, rows, first)


@lru_cache(maxsize=256)
def sampled(source: int, target: int) -> NDArray[np.int64]:
    """Return, ascending [target], the pixels that Pillow's NEAREST takes from a line of `source` pixels."""
    ramp = Image.fromarray(np.arange(source, dtype=np.int32)[None])
    taken: NDArray[np.int64] = np.asarray(ramp.resize((target, 1), Image.Resampling.NEAREST), dtype=np.int64)[0]
    taken.flags.writeable = False
    return taken


def _read_chunks(data: bytes) -> tuple[int, int, bytes] | None:
    """Return width, height and the compressed pixels of a PNG with no other chunks."""
    if not data.startswith(_SIGNATURE):
        return None
    position, size, compressed = len(_SIGNATURE), (0, 0), []
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
            compressed.append(body)
        elif kind == b"IHDR" and not size[0] and length == _IHDR.size:
            width, height, *form = _IHDR.unpack(body)
            if tuple(form) != _ONE_GREY_BIT or not (width and height):
                return None
            size = width, height
        elif kind == b"IEND" and compressed:
            return *size, b"".join(compressed)
        else:
            return None


def _unfilter(filters: NDArray[np.uint8], lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo the filters of each row. With less than a byte per pixel they work on whole bytes (9.2)."""
    rows = lines.copy()
    sub = filters == _SUB  # depends on its own row only; the other filters need the row above, in order
    rows[sub] = np.add.accumulate(rows[sub], axis=1, dtype=np.uint8)
    dependent = np.flatnonzero(filters > _SUB)
    if not len(dependent):
        return rows
    # Consecutive rows with one filter are one block.
    ends = np.flatnonzero((np.diff(dependent) != 1) | (np.diff(filters[dependent]) != 0))
    firsts, lasts = dependent[np.append(0, ends + 1)].tolist(), dependent[np.append(ends, -1)].tolist()
    for first, last in zip(firsts, (last + 1 for last in lasts), strict=True):
        if filters[first] == _UP:
            with_above = rows[max(0, first - 1) : last]
            np.add.accumulate(with_above, axis=0, dtype=np.uint8, out=with_above)
            continue
        for number in range(first, last):
            above = rows[number - 1] if number else np.zeros_like(rows[0])
            rows[number] = _undo_paeth(rows[number].tolist(), above.tolist())
    return rows


def _undo_paeth(line: list[int], above: list[int]) -> list[int]:
    """Undo filter 4, in which each byte depends on the decoded byte to its left (9.4)."""
    left = upper_left = 0
    decoded = []
    for value, upper in zip(line, above, strict=True):
        to_left, to_upper = abs(upper - upper_left), abs(left - upper_left)
        to_upper_left = abs(left + upper - 2 * upper_left)
        if to_left <= to_upper and to_left <= to_upper_left:
            predicted = left
        else:
            predicted = upper if to_upper <= to_upper_left else upper_left
        left = (value + predicted) & 0xFF
        decoded.append(left)
        upper_left = upper
    return decoded
