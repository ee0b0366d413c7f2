"""Many pictures as one: rows of equal height that fill a width."""

from collections.abc import Sequence
from itertools import accumulate, groupby

from PIL import Image

GAP = 8  # pixels between pictures
HIGHEST = 1.5

Size = tuple[int, int]  # width, height in pixels


def fit_rows(sizes: Sequence[Size], width: int, height: int) -> list[list[Size]]:
    """Scale pictures so that every row fills `width` and is about `height` pixels high.

    Rows of few or narrow pictures are shorter than `width`: none is higher than `HIGHEST` times `height`.
    """
    ratios = [w / h for w, h in sizes]
    total = sum(ratios)
    count = max(round(total * height / width), 1)
    # A picture is in the row in which its middle would be if all pictures were on one line.
    middles = [end - ratio / 2 for end, ratio in zip(accumulate(ratios), ratios, strict=True)]
    fitted = []
    for _, row in groupby(zip(middles, ratios, strict=True), key=lambda each: int(each[0] / total * count)):
        own = [ratio for _, ratio in row]
        filling = min((width - GAP * (len(own) - 1)) / sum(own), HIGHEST * height)
        fitted.append([(max(int(filling * ratio), 1), max(round(filling), 1)) for ratio in own])
    return fitted


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
