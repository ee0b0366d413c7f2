"""The check that every JPEG passes before it is stored or after it was read."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from shards.common.errors import UserError

_ORIENTATION = 0x0112  # tag of EXIF


class ImageError(ValueError):
    """Bytes that are not a whole image, or one of more pixels than allowed (`too_large`); the message is the reason."""

    def __init__(self, reason: str, *, too_large: bool = False) -> None:
        super().__init__(reason)
        self.too_large = too_large


@contextmanager
def pillow_errors(wanted: str = "a JPEG") -> Iterator[None]:
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
    """Return the orientation, 1 to 8, that the EXIF or XMP data of a JPEG states; 1 (as stored) without one."""
    try:
        with pillow_errors(), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            found = image.getexif().get(_ORIENTATION, 1)
    except ImageError:  # damaged metadata
        return 1
    return found if found in range(1, 9) else 1


def without_orientation(data: bytes) -> bytes:
    """Return a JPEG whose EXIF orientation, if it has one, is 1: all programs then show the pixels as stored.

    Only the value of the tag changes. A file with damaged metadata is returned as it is.

    Format: https://www.cipa.jp/std/documents/e/DC-008-2012_E.pdf (4.5.4 to 4.6.4).
    """
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


def jpeg_size(data: bytes, max_pixels: int | None = None, *, decode: bool = True) -> tuple[int, int]:
    """Decode a JPEG to its last byte and return its (width, height) in pixels as stored.

    EXIF orientation is ignored. All coded coefficients are read, which is where damage shows; the arithmetic from
    coefficients to pixels, which cannot fail, is done at an eighth of the size. `decode=False` reads the header only.
    An ImageError is raised for another format, damage, or more than `max_pixels` (None: than Pillow's own limit).
    """
    with pillow_errors(), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise ImageError(f"{width}x{height} pixels, the limit is {max_pixels}", too_large=True)
        if decode:
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
    return width, height
