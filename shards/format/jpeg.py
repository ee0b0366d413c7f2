"""The check that every JPEG passes before it is stored or after it was read."""

from __future__ import annotations

import io
import zlib

from PIL import Image, UnidentifiedImageError

# What Pillow raises on damaged files, depending on where the damage is.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, zlib.error)


class JpegError(ValueError):
    """Bytes that are not a whole JPEG, or one of more pixels than allowed (`too_large`); the message is the reason."""

    def __init__(self, reason: str, *, too_large: bool = False) -> None:
        super().__init__(reason)
        self.too_large = too_large


def check_jpeg(data: bytes, max_pixels: int | None = None, *, decode: bool = True) -> tuple[int, int]:
    """Decode a JPEG to its last byte and return its (width, height) in pixels as stored.

    EXIF orientation is ignored. All coded coefficients are read, which is where damage shows; the arithmetic from
    coefficients to pixels, which cannot fail, is done at an eighth of the size.

    Args:
        data: the file's bytes.
        max_pixels: a larger picture is refused. None: Pillow's own limit.
        decode: False reads the header only.

    Raises:
        JpegError: damaged, of another format, or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            width, height = image.size
            if max_pixels is not None and width * height > max_pixels:
                raise JpegError(f"{width}x{height} pixels, the limit is {max_pixels}", too_large=True)
            if decode:
                image.draft(None, (max(1, width // 8), max(1, height // 8)))
                image.load()
    except JpegError:
        raise
    except UnidentifiedImageError as error:
        raise JpegError("not a JPEG") from error  # Pillow's text contains a memory address
    except Image.DecompressionBombError as error:
        raise JpegError(str(error), too_large=True) from error
    except DECODE_ERRORS as error:
        raise JpegError(str(error)) from error
    return width, height
