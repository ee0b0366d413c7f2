import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.format.image import ImageError, exif_orientation, image_size, rgb, without_orientation
from tests.support import jpeg


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = jpeg(48, 32, 0)
PNG = saved(Image.open(io.BytesIO(PICTURE)), "PNG")


@pytest.mark.parametrize(
    ("data", "limit", "reason", "too_large"),
    [
        (b"", None, "not a JPEG", False),
        (saved(Image.new("RGB", (4, 4)), "BMP"), None, "not a JPEG or PNG", False),
        (PNG[:-12], None, "the PNG has no end", False),
        (PNG[:-30], None, "truncated", False),
        (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], None, "the chunk IDAT at byte 33 has another checksum", False),
        (PNG, 48 * 32 - 1, "48x32 pixels, the limit is 1535", True),
        (PICTURE[:-200], None, "truncated", False),
        (PICTURE, 48 * 32 - 1, "48x32 pixels, the limit is 1535", True),
    ],
)
def test_a_damaged_or_too_large_file_is_refused_with_a_reason(
    data: bytes, limit: int | None, reason: str, too_large: bool
) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        image_size(data, limit)
    assert caught.value.too_large is too_large


@pytest.mark.parametrize("endian", ["<", ">"])
def test_without_orientation_changes_that_tag_alone(endian: str) -> None:
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F], exif[0x0112], exif[0x0131] = "a camera", 6, "a program"
    turned = saved(Image.open(io.BytesIO(PICTURE)), exif=exif.tobytes())
    upright = without_orientation(turned)
    assert (exif_orientation(turned), exif_orientation(upright)) == (6, 1)
    assert sum(a != b for a, b in zip(turned, upright, strict=True)) == 1
    turned = saved(Image.open(io.BytesIO(PICTURE)), "PNG", exif=exif)
    assert (exif_orientation(turned), without_orientation(turned)) == (6, PNG)
    for data in (PICTURE, PNG, turned[:40], b"", b"\xff" * 50):  # without the tag, or damaged
        assert without_orientation(data) == data


def _passes(data: bytes) -> bool:
    try:
        image_size(data)
    except ImageError:
        return False
    return True


@pytest.mark.parametrize("progressive", [False, True])
def test_the_same_damage_is_found_as_at_full_size(progressive: bool) -> None:
    good = saved(Image.open(io.BytesIO(jpeg(160, 100, 1))), progressive=progressive)
    generator = np.random.default_rng(0)
    verdicts = set()
    for _ in range(80):
        data = bytearray(good[: generator.integers(1, len(good) + 1)] if generator.random() < 0.3 else good)
        for place in generator.integers(0, len(data), generator.integers(0, 4)):
            data[place] = generator.integers(256)
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                image.load()
                whole = True
        except (OSError, SyntaxError, ValueError):
            whole = False
        if data != good:
            verdicts.add(whole)
        assert _passes(bytes(data)) == whole
    assert verdicts == {True, False}


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpegs_of_any_size_and_mode_pass_with_the_size_of_the_stored_pixels(mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    for size in ((1, 1), (7, 300), (300, 3), (8, 8)):
        assert image_size(saved(Image.new(mode, size), exif=exif), size[0] * size[1]) == size


def test_pixels_of_every_mode_are_rgb_without_alpha() -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 255)
    faint = ramp.convert("RGBA")
    faint.putalpha(7)
    for image in (ramp, ramp.convert("P"), ramp.convert("RGB"), faint, ramp.convert("LA"), deep):
        with Image.open(io.BytesIO(saved(image, "PNG"))) as stored:
            assert np.array_equal(rgb(stored), np.repeat(np.asarray(ramp)[:, :, None], 3, axis=2))
