import pytest
from PIL import Image

from shards.drawing.contact_sheet import GAP, HIGHEST, Size, fit_rows, join_rows


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ([(640, 480)] * 8, 2),
        ([(600, 800), (1200, 600), (30, 20), (700, 900), (45, 30), (640, 480)], 2),
        ([(640, 480), (480, 640)] * 7, 3),
        ([(5000, 10)], 1),
    ],
)
def test_rows_fill_the_width_and_keep_order_and_shape(sizes: list[Size], rows: int) -> None:
    fitted = fit_rows(sizes, 900, 200)
    assert len(fitted) == rows
    flat = [size for row in fitted for size in row]
    assert len(flat) == len(sizes)
    assert all(abs(w - h * old[0] / old[1]) <= 1 + old[0] / old[1] for (w, h), old in zip(flat, sizes, strict=True))
    for row in fitted:
        assert 900 - len(row) <= sum(w for w, _ in row) + GAP * (len(row) - 1) <= 900
        assert row[0][1] <= HIGHEST * 200
    sheet = join_rows([[Image.new("RGB", size, "red") for size in row] for row in fitted])
    assert sheet.height == sum(row[0][1] for row in fitted) + GAP * (len(fitted) - 1)


def test_a_row_that_would_be_too_high_is_shorter_than_the_width() -> None:
    assert fit_rows([(30, 40)], 900, 200) == [[(225, 300)]]
