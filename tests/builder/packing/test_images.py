import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from builder.fetching.fetch import Refusal
from builder.fetching.zip_members import MemberError
from builder.packing.images import Failure, check_jpeg, encode_mask, pixel_box, same_shape
from shards.format import rle
from tests.support import jpeg

fraction = st.floats(-0.5, 1.5)


def png(pixels: np.ndarray, mode: str = "1") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def blob(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return (x / width - 0.4) ** 2 + (y / height - 0.6) ** 2 < 0.05


@given(st.tuples(fraction, fraction, fraction, fraction), st.integers(1, 2000), st.integers(1, 2000))
def test_pixel_boxes_lie_in_the_image(box: tuple[float, float, float, float], width: int, height: int) -> None:
    x, y, w, h = pixel_box(box, width, height)
    assert 0 <= x <= width
    assert 0 <= y <= height
    if box[0] <= box[1]:
        assert w >= 0
        assert x + w <= width + 1e-9
        assert math.isclose(x + w, min(max(box[1], 0), 1) * width, abs_tol=2e-3)
    for value in (x, y, w, h):
        assert round(value, 3) == value


def test_a_whole_image_box_is_the_image() -> None:
    assert pixel_box((0.0, 1.0, 0.0, 1.0), 1024, 683) == (0.0, 0.0, 1024.0, 683.0)


@given(st.integers(64, 6000), st.integers(64, 6000), st.integers(32, 1600), st.integers(32, 1600))
def test_two_rounded_sizes_of_one_picture_have_one_shape(width: int, height: int, long_a: int, long_b: int) -> None:
    def resized(long_side: int, rounding: type[math.floor] = round) -> tuple[int, int]:  # type: ignore[valid-type]
        scale = long_side / max(width, height)
        return max(1, rounding(width * scale)), max(1, rounding(height * scale))

    assert same_shape(resized(long_a), resized(long_b))
    assert same_shape(resized(long_a, math.floor), resized(long_b, math.ceil))


def test_other_shapes_are_told_apart() -> None:
    assert same_shape((1600, 1200), (1024, 768))
    assert same_shape((1600, 1067), (1024, 683))
    assert not same_shape((1600, 1200), (768, 1024))
    assert not same_shape((1600, 1066), (1024, 768))
    assert not same_shape((64, 64), (1024, 768))


@pytest.mark.parametrize("size", [(1600, 1200), (640, 480), (128, 96), (1024, 768)])
def test_a_mask_is_its_png_resized_to_the_image(size: tuple[int, int]) -> None:
    data = png(blob(*size))
    encoded = encode_mask(data, 640, 480)
    assert isinstance(encoded, rle.Rle)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.resize((640, 480), Image.Resampling.NEAREST))
    assert (rle.decode(encoded) == expected).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_non_zero_is_the_object_in_every_kind_of_png(mode: str) -> None:
    pixels = blob(64, 48)
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray((pixels * 300).astype(np.uint16)).save(buffer, "PNG")
        data = buffer.getvalue()
    else:
        data = png((pixels * 7).astype(np.uint8), mode) if mode != "1" else png(pixels)
    encoded = encode_mask(data, 64, 48)
    assert isinstance(encoded, rle.Rle)
    assert (rle.decode(encoded) == pixels).all()


def test_masks_that_cannot_be_used_have_a_reason() -> None:
    good = png(blob(640, 480))
    thin = np.zeros((480, 640), bool)
    thin[1, 1] = True
    cases = {
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
            assert " at 0x" not in found.detail  # the same on every run


@given(st.binary(max_size=100), st.booleans())
def test_no_bytes_make_decoding_fail_in_another_way(data: bytes, headed: bool) -> None:
    assert isinstance(encode_mask(b"\x89PNG\r\n\x1a\n" + data if headed else data, 16, 16), Failure)
    assert isinstance(check_jpeg(b"\xff\xd8\xff" + data if headed else data), Failure)


def test_jpegs_are_decoded_to_the_end() -> None:
    data = jpeg(320, 200, 1)
    assert check_jpeg(data) == (320, 200)
    for broken in (data[: len(data) // 2], b"", b"<html>", png(blob(8, 8))):
        found = check_jpeg(broken)
        assert isinstance(found, Failure)
        assert found.status == "image-undecodable"
        assert " at 0x" not in found.detail
    assert check_jpeg(Refusal("missing")) == Failure("image-missing", "")
    assert check_jpeg(Refusal("refused")) == Failure("image-refused", "")


@pytest.mark.parametrize("progressive", [False, True])
def test_damage_shows_as_in_a_decoding_at_full_size(progressive: bool) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(320, 200, 1))).save(buffer, "JPEG", progressive=progressive)
    good = buffer.getvalue()
    generator = np.random.default_rng(0)
    verdicts = set()
    for _ in range(300):
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
        found = check_jpeg(bytes(data))
        assert isinstance(found, tuple) == whole or getattr(found, "status", "") == "image-too-large"
    assert verdicts == {True, False}


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 300), (300, 3), (8, 8)])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpegs_of_any_size_and_mode_pass(width: int, height: int, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "JPEG")
    assert check_jpeg(buffer.getvalue()) == (width, height)


def test_a_pixel_bomb_is_not_decoded() -> None:
    data = bytearray(jpeg(320, 200, 1))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (60000).to_bytes(2, "big") * 2
    found = check_jpeg(bytes(data))
    assert isinstance(found, Failure)
    assert found.status == "image-too-large"


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    buffer = io.BytesIO()
    Image.new("RGB", (320, 200)).save(buffer, "JPEG", exif=exif)
    assert check_jpeg(buffer.getvalue()) == (320, 200)
