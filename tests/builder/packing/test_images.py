import io
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from builder.fetching.fetch import Refusal
from builder.fetching.zip_members import MemberError
from builder.packing.images import check_image, encode_mask, pixel_box, same_shape
from builder.tasks.plan import Failure
from shards.format import rle
from shards.format.image import exif_orientation
from tests.support import jpeg

fraction = st.floats(-0.5, 1.5)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(pixels: np.ndarray, mode: str = "1") -> bytes:
    return saved(Image.fromarray(pixels).convert(mode), "PNG")


def blob(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return (x / width - 0.4) ** 2 + (y / height - 0.6) ** 2 < 0.05


@given(st.tuples(fraction, fraction, fraction, fraction), st.integers(1, 2000), st.integers(1, 2000))
def test_pixel_boxes_are_clipped_to_the_image(box: tuple[float, float, float, float], width: int, height: int) -> None:
    x, y, w, h = pixel_box(box, width, height)
    assert 0 <= x <= width
    assert 0 <= y <= height
    if box[0] <= box[1]:
        assert w >= 0
        assert x + w <= width + 1e-9
        assert math.isclose(x + w, min(max(box[1], 0), 1) * width, abs_tol=2e-3)
    for value in (x, y, w, h):
        assert round(value, 3) == value
    assert pixel_box((0.0, 1.0, 0.0, 1.0), width, height) == (0, 0, width, height)


@given(st.integers(64, 6000), st.integers(64, 6000), st.integers(32, 1600), st.integers(32, 1600))
def test_two_rounded_sizes_of_one_picture_have_the_same_shape(
    width: int, height: int, long_a: int, long_b: int
) -> None:
    one, other = (
        [max(1.0, side * length / max(width, height)) for side in (width, height)] for length in (long_a, long_b)
    )
    for first, second in ((round, round), (math.floor, math.ceil)):
        assert same_shape((first(one[0]), first(one[1])), (second(other[0]), second(other[1])))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_another_format_is_named() -> None:
    for name, options in (("GIF", {}), ("WebP", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"big_tiff": True})):
        data = saved(Image.new("RGB", (8, 8)), name, **options)
        reason = f"a {name}: shards hold JPEG and PNG; --to-jpeg 95 converts it"
        assert check_image(data) == Failure("image-undecodable", reason)
        assert isinstance(check_image(data[:12], 95), Failure)
        stored = check_image(data, 95)
        assert not isinstance(stored, Failure)
        assert stored[1] == (8, 8)
        assert stored[0].startswith(b"\xff\xd8")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_conversion_keeps_the_stored_pixels_and_their_orientation(orientation: int) -> None:
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey, deep = Image.fromarray(ramp), Image.fromarray(ramp.astype(np.uint16) * 256)
    for kind, picture in (("PNG", grey), ("PNG", deep), ("WebP", grey.convert("RGB")), ("TIFF", grey)):
        data = saved(picture, kind, exif=exif)
        stored = check_image(data, 95)
        assert not isinstance(stored, Failure)
        assert (stored[1], exif_orientation(stored[0])) == ((64, 48), orientation)
        assert np.abs(np.asarray(Image.open(io.BytesIO(stored[0])).convert("L")).astype(int) - ramp).max() < 8
    data = jpeg(32, 20, 0)
    assert check_image(data, 95) == (data, (32, 20))


def test_same_shape() -> None:
    assert same_shape((1600, 1200), (1024, 768))
    assert same_shape((1600, 1067), (1024, 683))
    for other in ((768, 1600), (1024, 700), (1200, 1200)):
        assert not same_shape((1600, 1200), other)


@pytest.mark.parametrize("size", [(1600, 1200), (640, 480), (128, 96)])
def test_masks_are_resized_to_the_image(size: tuple[int, int]) -> None:
    data = png(blob(*size))
    encoded = encode_mask(data, 640, 480)
    assert isinstance(encoded, rle.Rle)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.resize((640, 480), Image.Resampling.NEAREST))
    assert (rle.decode(encoded) == expected).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_non_zero_pixels_are_the_object_in_every_kind_of_png(mode: str) -> None:
    pixels = blob(64, 48)
    scaled = {"1": pixels, "I;16": (pixels * 300).astype(np.uint16)}.get(mode, (pixels * 7).astype(np.uint8))
    encoded = encode_mask(png(scaled, mode), 64, 48)
    assert isinstance(encoded, rle.Rle)
    assert (rle.decode(encoded) == pixels).all()


def test_unusable_masks_have_a_status_and_a_reproducible_detail() -> None:
    good = png(blob(640, 480))
    thin = np.zeros((480, 640), bool)
    thin[1, 1] = True
    cases: dict[str, list[Any]] = {
        "mask-missing": [None],
        "mask-undecodable": [
            MemberError("its CRC is not the one in the directory"),
            good[: len(good) // 2],
            b"",
            b"GIF89a",
            jpeg(640, 480, 1),
            good[:50] + bytes([good[50] ^ 255]) + good[51:],
        ],
        "mask-empty": [png(np.zeros((480, 640), bool)), png(np.zeros((3, 4), bool)), png(thin)],
        "mask-shape": [png(blob(480, 640)), png(blob(640, 640))],
    }
    for status, candidates in cases.items():
        for data in candidates:
            found = encode_mask(data, 160, 120)
            assert isinstance(found, Failure)
            assert found.status == status
            assert " at 0x" not in found.detail  # no memory address


@given(st.binary(max_size=100), st.booleans())
def test_arbitrary_bytes_are_failures(data: bytes, with_signature: bool) -> None:
    assert isinstance(encode_mask(b"\x89PNG\r\n\x1a\n" + data if with_signature else data, 16, 16), Failure)
    assert isinstance(check_image(b"\xff\xd8\xff" + data if with_signature else data), Failure)


def test_check_image_returns_the_size_or_a_failure() -> None:
    data = jpeg(320, 200, 1)
    assert check_image(data) == (data, (320, 200))
    picture = png(blob(8, 8))
    assert check_image(picture) == (picture, (8, 8))
    assert check_image(b"<html>") == Failure("image-undecodable", "not a JPEG or PNG")
    for reason in ("missing", "refused"):
        assert check_image(Refusal(reason)) == Failure(f"image-{reason}", "")
    frame = data.index(b"\xff\xc0")  # a header of 3.6 billion pixels
    bomb = data[: frame + 5] + (60000).to_bytes(2, "big") * 2 + data[frame + 9 :]
    found = check_image(bomb)
    assert isinstance(found, Failure)
    assert found.status == "image-too-large"
