import io

import pytest
from PIL import Image

from shards.format.jpeg import JpegError, check_jpeg
from tests.support import jpeg

PICTURE = jpeg(48, 32, 0)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_whole_jpeg_has_its_size_as_stored() -> None:
    assert check_jpeg(PICTURE, 48 * 32) == (48, 32)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (48, 32)).save(buffer, "JPEG", exif=exif)
    assert check_jpeg(buffer.getvalue()) == (48, 32)


@pytest.mark.parametrize(
    ("data", "limit", "reason", "too_large"),
    [
        (b"", None, "not a JPEG", False),
        (png(), None, "not a JPEG", False),
        (PICTURE[:-200], None, "truncated", False),
        (PICTURE, 48 * 32 - 1, "48x32 pixels, the limit is 1535", True),
    ],
)
def test_what_is_damaged_of_another_format_or_too_large_has_a_reason(
    data: bytes, limit: int | None, reason: str, too_large: bool
) -> None:
    with pytest.raises(JpegError, match=reason) as caught:
        check_jpeg(data, limit)
    assert caught.value.too_large is too_large
