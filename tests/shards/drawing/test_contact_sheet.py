import pytest
from PIL import Image

from shards.drawing.contact_sheet import GAP, Size, fit_rows, join_rows


@pytest.mark.parametrize("sizes", [[(640, 480)] * 7, [(600, 800), (1600, 200), (100, 900), (30, 30)], [(5000, 10)]])
def test_rows_fill_the_width_but_for_the_last_and_keep_order_and_shape(sizes: list[Size]) -> None:
    rows = fit_rows(sizes, 900, 200)
    flat = [size for row in rows for size in row]
    assert len(flat) == len(sizes)
    assert all(h <= 200 and abs(w - h * old[0] / old[1]) <= 1 + old[0] / old[1] for (w, h), old in zip(flat, sizes))
    sheet = join_rows([[Image.new("RGB", size, "red") for size in row] for row in rows])
    for row in rows[:-1]:
        assert 900 - len(row) <= sum(w for w, _ in row) + GAP * (len(row) - 1) <= 900
    assert sheet.width <= 900
    assert sheet.height == sum(row[0][1] for row in rows) + GAP * (len(rows) - 1)
