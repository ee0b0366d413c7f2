"""Check images, resize and encode mask PNGs, convert boxes to pixels. Pure functions.

Images are taken as stored: EXIF orientation is ignored, because Open Images' boxes and masks ignore it. Annotations
that follow it are turned by `builder.packing.picture_frame`.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from builder.fetching.fetch import Refusal
from builder.fetching.zip_members import MemberError
from builder.packing.bit_png import BitImage, read_bits
from builder.tasks.plan import Box, Failure, Size
from shards.format import image as image_files
from shards.format import rle
from shards.format.sample import PNG_SIGNATURE

MAX_PIXELS = 64 << 20  # of an image or mask: 64 Mpx, sixty times the images of Open Images, below Pillow's own limit

# First bytes -> name of the format, for those that shards do not hold.
_OTHER_FORMATS = {
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # of more than 4 GB, or written as if
    b"MM\0+": "TIFF",
}


def check_image(data: bytes | Refusal, to_jpeg: int = 0) -> tuple[bytes, Size] | Failure:
    """Return the bytes to store, and the (width, height) in pixels as stored; or why an image cannot be used.

    A JPEG or PNG is stored as it is. `to_jpeg`, unless 0, is the quality at which all but JPEGs are converted.
    """
    if isinstance(data, Refusal):
        return Failure(f"image-{data.reason}", "")
    kind = next((name for start, name in _OTHER_FORMATS.items() if data.startswith(start)), "")
    try:
        if to_jpeg and (kind or data.startswith(PNG_SIGNATURE)):
            data = image_files.to_jpeg(data, to_jpeg, MAX_PIXELS)
        elif kind:
            return Failure("image-undecodable", f"a {kind}: shards hold JPEG and PNG; --to-jpeg 95 converts it")
        return data, image_files.image_size(data, MAX_PIXELS)
    except image_files.ImageError as error:
        return Failure("image-too-large" if error.too_large else "image-undecodable", str(error))


def encode_mask(data: bytes | MemberError | None, width: int, height: int) -> rle.Rle | Failure:
    """Decode a mask PNG, resize it to the size of its image in pixels, and encode it; None if no zip holds it."""
    if data is None:
        return Failure("mask-missing", "not in its zip")
    if isinstance(data, MemberError):
        return Failure("mask-undecodable", f"zip member: {data}")
    bits = read_bits(data, MAX_PIXELS) or _read_with_pillow(data)
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


def same_shape(one: Size, other: Size) -> bool:
    """Return whether two (width, height) can be the same picture at two sizes.

    Each side was rounded to whole pixels, up or down. This error of less than one pixel per side changes the cross
    product of the sides by less than their sum.
    """
    return abs(one[0] * other[1] - one[1] * other[0]) <= sum(one) + sum(other)


def pixel_box(box: Box, width: int, height: int) -> Box:
    """Convert (x1, x2, y1, y2) in fractions to (x, y, w, h) in pixels, clipped to the image, rounded to 0.001."""
    x1, x2, y1, y2 = (min(max(value, 0.0), 1.0) for value in box)
    left, right, top, bottom = (round(value, 3) for value in (x1 * width, x2 * width, y1 * height, y2 * height))
    return left, top, round(right - left, 3), round(bottom - top, 3)


def _read_with_pillow(data: bytes) -> BitImage | Failure:
    """Decode a PNG of any kind; non-zero pixels are the object."""
    try:
        with image_files.pillow_errors("a PNG"), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                return Failure("mask-undecodable", f"{width}x{height} pixels, the limit is {MAX_PIXELS}")
            image.load()
            return BitImage(width, height, np.packbits(_non_zero(image), axis=1))
    except image_files.ImageError as error:
        return Failure("mask-undecodable", str(error))


def _non_zero(image: Image.Image) -> NDArray[np.bool_]:
    """Return bool [H, W]: palette images by their colours, an alpha channel ignored."""
    pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "LA", "RGBA") else image) != 0
    return np.asarray(pixels.any(axis=2) if pixels.ndim == 3 else pixels, dtype=np.bool_)
