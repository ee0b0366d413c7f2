"""Images as files: the check that each one passes before it is stored or after it was read, and its pixels as RGB.

A shard holds JPEGs and PNGs as they are at their source. Pixels count as stored: EXIF orientation is ignored.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from isal import isal_zlib as zlib
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from shards.common.errors import UserError
from shards.format.sample import LARGEST_SIDE, PNG_SIGNATURE

STORED = ("JPEG", "PNG")  # formats of the images in shards, by Pillow's names
CONVERTED = ("PNG", "WEBP", "BMP", "TIFF", "GIF")  # formats that `to_jpeg` reads: of several frames, the first

_ORIENTATION = 0x0112  # tag of EXIF
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks in which Pillow looks for an orientation


class ImageError(ValueError):
    """Bytes that are not a whole image, or one of more pixels than allowed (`too_large`); the message is the reason."""

    def __init__(self, reason: str, *, too_large: bool = False) -> None:
        super().__init__(reason)
        self.too_large = too_large


@contextmanager
def pillow_errors(wanted: str = "a JPEG or PNG") -> Iterator[None]:
    """Turn whatever Pillow raises on a file into an `ImageError`; one of no known format is "not `wanted`"."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not {wanted}") from error  # Pillow's text contains a memory address
    except Image.DecompressionBombError as error:
        raise ImageError(str(error), too_large=True) from error
    except UserError:
        raise
    # For damaged files there is no common type: it depends on the format and on where the damage is.
    except Exception as error:
        raise ImageError(str(error) or type(error).__name__) from error


def exif_orientation(data: bytes) -> int:
    """Return the orientation, 1 to 8, that the EXIF or XMP data of an image states; 1 (as stored) without one."""
    try:
        # Pillow decodes a whole PNG to look behind its pixels.
        if data.startswith(PNG_SIGNATURE) and not any(kind in _PNG_METADATA for kind, _, _ in _png_chunks(data)):
            return 1
        with pillow_errors(), Image.open(io.BytesIO(data), formats=STORED) as image:
            found = image.getexif().get(_ORIENTATION, 1)
    except ImageError:  # damaged metadata
        return 1
    return found if found in range(1, 9) else 1


def without_orientation(data: bytes) -> bytes:
    """Return an image whose EXIF orientation, if it has one, is 1: all programs then show the pixels as stored.

    Of a JPEG, only the value of the tag changes; a PNG with an orientation loses its EXIF and its texts. A file with
    damaged metadata is returned as it is.

    Formats: https://www.cipa.jp/std/documents/e/DC-008-2012_E.pdf (4.5.4 to 4.6.4), https://www.w3.org/TR/png-3/ (5).
    """
    if data.startswith(PNG_SIGNATURE):
        if exif_orientation(data) == 1:
            return data
        kept = (data[start:end] for kind, start, end in _png_chunks(data) if kind not in _PNG_METADATA)
        return PNG_SIGNATURE + b"".join(kept)
    found = bytearray(data)
    try:
        segment = 2
        while found[segment] == 0xFF and found[segment + 1] != 0xDA:  # up to the start of the scan
            if found[segment + 1] == 0xE1 and found[segment + 4 : segment + 10] == b"Exif\0\0":
                tiff = segment + 10
                order = "<" if found[tiff : tiff + 2] == b"II" else ">"
                directory = tiff + struct.unpack_from(f"{order}I", found, tiff + 4)[0]
                [entries] = struct.unpack_from(f"{order}H", found, directory)
                for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
                    if struct.unpack_from(f"{order}H", found, entry) == (_ORIENTATION,):
                        struct.pack_into(f"{order}H", found, entry + 8, 1)
            segment += 2 + struct.unpack_from(">H", found, segment + 2)[0]
    except (IndexError, struct.error):
        return data
    return bytes(found)


def image_size(data: bytes, max_pixels: int | None = None, *, decode: bool = True) -> tuple[int, int]:
    """Decode a JPEG or PNG to its last byte and return its (width, height) in pixels as stored.

    Of a JPEG, all coded coefficients are read, which is where damage shows; the arithmetic from coefficients to pixels,
    which cannot fail, is done at an eighth of the size. Of a PNG, the checksums are compared, too, which Pillow omits.
    `decode=False` reads the header only. An ImageError is raised for another format, damage, or more than `max_pixels`
    (None: than Pillow's own limit).
    """
    with pillow_errors(), Image.open(io.BytesIO(data), formats=STORED) as image:
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise ImageError(f"{width}x{height} pixels, the limit is {max_pixels}", too_large=True)
        if max(width, height) > LARGEST_SIDE:
            raise ImageError(f"{width}x{height} pixels, the limit of a side is {LARGEST_SIDE}", too_large=True)
        if decode:
            if image.format == "PNG":
                _check_png(data)
            else:
                image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
    return width, height


def rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an image of any mode, uint8 [H, W, 3].

    Grey is repeated, a palette is replaced by its colours, an alpha channel is dropped, and 16-bit channels keep their
    upper eight bits, as Pillow converts 16-bit colours. An ImageError is raised for 32 bits per channel.
    """
    # Pillow reads 16-bit grey PNG and PGM as `I;16` or `I`, depending on its version, and `convert` clips them to 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise ImageError(
            f"it has 32-bit {kind}, whose range from black to white is unknown: save it with 8 bits per channel, for "
            "example as PNG"
        )
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def to_jpeg(data: bytes, quality: int, max_pixels: int) -> bytes:
    """Return the pixels of an image of one of `CONVERTED` as a JPEG, quality 1 to 100, with the same EXIF orientation.

    An ImageError is raised for another format, damage, or more than `max_pixels`.
    """
    if data.startswith(PNG_SIGNATURE):
        image_size(data, max_pixels)
    with pillow_errors(f"one of {', '.join(CONVERTED)}"), Image.open(io.BytesIO(data), formats=CONVERTED) as image:
        if image.width * image.height > max_pixels:
            raise ImageError(f"{image.width}x{image.height} pixels, the limit is {max_pixels}", too_large=True)
        # Pillow turns a TIFF, and only a TIFF, when it reads the pixels; of a PNG it finds the EXIF after the pixels.
        turned = image.getexif().get(_ORIENTATION, 1) if image.format == "TIFF" else 1
        pixels = as_stored(rgb(image), turned)
        orientation = turned if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
        exif = Image.Exif()
        if orientation != 1:
            exif[_ORIENTATION] = orientation
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, exif=exif)
    return buffer.getvalue()


def as_stored(upright: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return an upright picture [H, W, ...] as a file with that EXIF orientation, 1 to 8, stores it.

    Format: https://www.cipa.jp/std/documents/e/DC-008-2012_E.pdf (4.6.4, tag 0x0112).
    """
    turns = {3: 2, 4: 2, 6: 1, 7: 2, 8: -1}.get(orientation, 0)  # counter-clockwise, by 90 degrees
    turned = np.rot90(upright, turns)
    if orientation in (2, 4):
        turned = turned[:, ::-1]
    return turned.swapaxes(0, 1) if orientation in (5, 7) else turned


def _check_png(data: bytes) -> None:
    """Raise an ImageError if a PNG has no end or a chunk does not match its checksum."""
    last = b""
    for last, start, end in _png_chunks(data):
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise ImageError(f"damaged: the chunk {last.decode('latin-1')} at byte {start} has another checksum")
    if last != b"IEND":
        raise ImageError("truncated: the PNG has no end")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type, start and end of each whole chunk of a PNG, up to the last."""
    start, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND" and start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if end > len(data):
            return
        kind = data[start + 4 : start + 8]
        yield kind, start, end
        start = end
