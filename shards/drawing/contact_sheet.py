"""Many pictures as one: rows of equal height that fill a width."""

from collections.abc import Sequence

from PIL import Image

GAP = 8  # pixels between pictures

Size = tuple[int, int]  # width, height in pixels


def fit_rows(sizes: Sequence[Size], width: int, height: int) -> list[list[Size]]:
    """Scale pictures so that rows fill `width`, except the last one, and are at most `height` pixels high."""
    rows, row = list[list[Size]](), list[Size]()
    for size in sizes:
        row.append(size)
        filling = (width - GAP * (len(row) - 1)) / sum(w / h for w, h in row)
        if filling <= height:
            rows.append(_scaled(row, filling))
            row = []
    return [*rows, _scaled(row, height)] if row else rows


def join_rows(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Paste rows of pictures below each other, on white; at least one picture."""
    widths = [sum(picture.width for picture in row) + GAP * (len(row) - 1) for row in rows]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (max(widths), sum(heights) + GAP * (len(rows) - 1)), "white")
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width + GAP
        y += height + GAP
    return sheet


def _scaled(row: Sequence[Size], height: float) -> list[Size]:
    return [(max(int(height * w / h), 1), max(round(height), 1)) for w, h in row]
