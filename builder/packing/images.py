"""JPEGs checked, mask PNGs resized and encoded, boxes in pixels: what a sample is made of. Pure.

Pictures are taken as stored: EXIF orientation is ignored, since Open Images' boxes and masks do not know of it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from builder.fetching.fetch import Refusal
from builder.fetching.zip_members import MemberError
from builder.packing.bit_png import BitImage, read_bits
from shards.format import jpeg, rle

IMAGE_PIXELS = 64 << 20  # 64 Mpx: sixty times what Open Images ships, and below Pillow's own alarm
MASK_PIXELS = 64 << 20


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image or mask cannot be used: the status of its account, and a detail that is the same on every run."""

    status: str
    detail: str


def check_jpeg(data: bytes | Refusal) -> tuple[int, int] | Failure:
    """Return (width, height) of an image in pixels as stored, EXIF orientation ignored, or why it cannot be used."""
    if isinstance(data, Refusal):
        return Failure(f"image-{data.reason}", "")
    try:
        return jpeg.check_jpeg(data, IMAGE_PIXELS)
    except jpeg.JpegError as error:
        return Failure("image-too-large" if error.too_large else "image-undecodable", str(error))


def encode_mask(data: bytes | MemberError | None, width: int, height: int) -> rle.Rle | Failure:
    """Decode a mask PNG, resize it to the image's exact size and encode it.

    Args:
        data: the PNG; None where no zip holds it.
        width, height: of the image, in pixels.
    """
    if data is None:
        return Failure("mask-missing", "not in its zip")
    if isinstance(data, MemberError):
        return Failure("mask-undecodable", f"zip member: {data}")
    bits = read_bits(data, MASK_PIXELS) or _read_picture(data)
    if isinstance(bits, Failure):
        return bits
    if bits.extent is None:
        return Failure("mask-empty", "no pixel is set")
    if not same_shape((bits.width, bits.height), (width, height)):
        return Failure("mask-shape", f"the mask is {bits.width}x{bits.height}, the image {width}x{height}")
    part = bits.resized(width, height)
    if part is None:
        return Failure("mask-empty", "no pixel is left at the image's size")
    return rle.encode_part(*part, height, width)


def _read_picture(data: bytes) -> BitImage | Failure:
    """A PNG of any kind, by Pillow; non-zero is the object."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            if width * height > MASK_PIXELS:
                return Failure("mask-undecodable", f"{width}x{height} pixels, the limit is {MASK_PIXELS}")
            image.load()
            return BitImage(width, height, np.packbits(_non_zero(image), axis=1))
    except UnidentifiedImageError:
        return Failure("mask-undecodable", "not a PNG")
    except Image.DecompressionBombError as error:
        return Failure("mask-undecodable", str(error))
    except jpeg.DECODE_ERRORS as error:
        return Failure("mask-undecodable", str(error))


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (width, height) can be one picture at two sizes.

    Each side was rounded to whole pixels, up or down: an error below one pixel a side, which moves the cross product
    of the sides by less than their sum.
    """
    return abs(one[0] * other[1] - one[1] * other[0]) <= sum(one) + sum(other)


def pixel_box(box: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float]:
    """(x1, x2, y1, y2) as fractions to (x, y, w, h) in pixels, clipped to the image, rounded to 1/1000 pixel."""
    x1, x2, y1, y2 = (min(max(value, 0.0), 1.0) for value in box)
    left, right, top, bottom = (round(value, 3) for value in (x1 * width, x2 * width, y1 * height, y2 * height))
    return left, top, round(right - left, 3), round(bottom - top, 3)


def _non_zero(image: Image.Image) -> NDArray[np.bool_]:
    """(H, W); a palette by its colours, an alpha channel left out."""
    pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "LA", "RGBA") else image) != 0
    return np.asarray(pixels.any(axis=2) if pixels.ndim == 3 else pixels, dtype=np.bool_)
