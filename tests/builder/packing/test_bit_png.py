import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from builder.packing.bit_png import read_bits, sampled
from tests.builder.packing.test_images import blob, png

PIXELS = 1 << 20


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def filtered(rows: np.ndarray, filters: list[int]) -> bytes:
    """The PNG specification's five filters, byte by byte."""
    out = bytearray()
    for number, kind in enumerate(filters):
        out.append(kind)
        for place, value in enumerate(rows[number].tolist()):
            left = int(rows[number, place - 1]) if place else 0
            up = int(rows[number - 1, place]) if number else 0
            corner = int(rows[number - 1, place - 1]) if number and place else 0
            distances = [(abs(up - corner), left), (abs(left - corner), up), (abs(left + up - 2 * corner), corner)]
            predicted = [0, left, up, (left + up) // 2, min(distances, key=lambda pair: pair[0])[1]][kind]
            out.append((value - predicted) & 0xFF)
    return bytes(out)


def bit_png(bits: np.ndarray, filters: list[int], parts: int = 1) -> bytes:
    height, width = bits.shape
    packed = zlib.compress(filtered(np.packbits(bits, axis=1), filters))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    cuts = [len(packed) * part // parts for part in range(parts + 1)]
    body = b"".join(chunk(b"IDAT", packed[a:b]) for a, b in itertools.pairwise(cuts))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


@st.composite
def pictures(draw: st.DrawFn) -> tuple[np.ndarray, bytes]:
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    flat = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    bits = np.array(flat, np.uint8).reshape(height, width)
    filters = draw(st.lists(st.sampled_from([0, 1, 2, 4]), min_size=height, max_size=height))
    return bits, bit_png(bits, filters, draw(st.integers(1, 3)))


@given(pictures(), st.integers(1, 50), st.integers(1, 50))
def test_decoding_and_resizing_equal_pillows(picture: tuple[np.ndarray, bytes], width: int, height: int) -> None:
    bits, data = picture
    found = read_bits(data, PIXELS)
    assert found is not None
    filled = np.unpackbits(found.rows, axis=1, count=found.width)
    below = len(bits) - found.first_row - len(filled)
    assert (np.pad(filled, ((found.first_row, below), (0, 0))) == bits).all()
    with Image.open(io.BytesIO(data)) as image:
        assert (np.asarray(image, np.uint8) == bits).all()
        expected = np.asarray(image.resize((width, height), Image.Resampling.NEAREST), np.uint8)
    whole = np.zeros((height, width), np.uint8)
    part = found.resized(width, height)
    if part is not None:
        inner, left, top = part
        whole[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    assert (whole == expected).all()
    assert part is not None or not expected.any()
    rows, columns = np.nonzero(bits)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if bits.any() else None
    assert found.extent == box


@pytest.mark.parametrize(("source", "target"), [(1600, 1024), (1067, 683), (1024, 1024), (300, 1024), (7, 3), (1, 5)])
def test_the_sampling_grid_is_pillows(source: int, target: int) -> None:
    line = np.random.default_rng(0).integers(0, 256, (1, source), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(line).resize((target, 1), Image.Resampling.NEAREST))
    assert (line[:, sampled(source, target)] == expected).all()


@given(pictures(), st.data())
def test_damaged_files_are_left_to_pillow(picture: tuple[np.ndarray, bytes], data: st.DataObject) -> None:
    _, good = picture
    cut = data.draw(st.integers(0, len(good) - 1))
    assert read_bits(good[:cut], PIXELS) is None
    flipped = bytearray(good)
    flipped[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    assert read_bits(bytes(flipped), PIXELS) is None


def test_other_forms_filters_and_sizes_are_left_to_pillow() -> None:
    bits = blob(40, 30).astype(np.uint8)
    whole = bit_png(bits, [0] * 30)
    assert read_bits(whole, 1200) is not None
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 1, 0, 0, 0, 0))
    bomb += chunk(b"IDAT", zlib.compress(bytes(1 << 24))) + chunk(b"IEND", b"")
    with_time = whole[:33] + chunk(b"tIME", bytes(7)) + whole[33:]
    others = [png(bits * 255, mode) for mode in ("L", "P", "RGB", "RGBA")]
    for data in (*others, whole.replace(b"IDAT", b"IDAX"), with_time, bomb, bit_png(bits, [0] * 29 + [3])):
        assert read_bits(data, PIXELS) is None
    assert read_bits(whole, 1199) is None
