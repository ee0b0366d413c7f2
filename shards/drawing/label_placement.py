"""Placement of names on a picture, each on a plate of its colour where it covers the fewest others."""

import unicodedata
from collections.abc import Sequence

from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]  # R, G, B, 0 to 255
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels, inclusive


class Labels:
    """Draws names on a picture of `size`, (width, height), with `text_scale`; the first get the best places."""

    def __init__(self, canvas: ImageDraw.ImageDraw, size: tuple[int, int], text_scale: float = 1.0) -> None:
        self.canvas, self.size = canvas, size
        self.font = ImageFont.load_default(size=text_scale * min(max(round(max(size) / 55), 12), 28))
        self.taken: list[Rectangle] = []
        self.named: set[tuple[Colour, int]] = set()

    def draw(self, text: str, colour: Colour, corners: Rectangle, category_id: int) -> None:
        """Draw `text` at a box, unless there is no room for it and another of its class and colour has a name."""
        text = without_accents(text)
        left, _, right, _ = (round(value) for value in self.canvas.textbbox((0, 0), text, font=self.font))
        # As high as a full line for any text, so that neighbouring plates align.
        line = round(self.canvas.textbbox((0, 0), "Ag", font=self.font)[3])
        margin = max(2, line // 5)
        plate = (right - left + 2 * margin, line + margin)
        tiny = corners[2] - corners[0] < plate[0] / 2 and corners[3] - corners[1] < plate[1] * 2
        covered, place = _place(corners, plate, self.size, self.taken)
        if (colour, category_id) in self.named and (tiny or covered > plate[0] * plate[1] / 4):
            return
        self.taken.append(place)
        self.named.add((colour, category_id))
        self.canvas.rectangle(place, fill=colour)
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 115
        ink = (255, 255, 255) if dark else (0, 0, 0)
        self.canvas.text((place[0] + margin - left, place[1] + margin // 2 - 1), text, fill=ink, font=self.font)


def without_accents(text: str) -> str:
    """Return text with plain letters for those with accents, which Pillow's own font lacks."""

    def plain(character: str) -> str:
        decomposed = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
        return decomposed if decomposed.isascii() else character

    return "".join(map(plain, text))


def _place(
    corners: Rectangle, plate: tuple[int, int], size: tuple[int, int], taken: Sequence[Rectangle]
) -> tuple[int, Rectangle]:
    """Return the number of pixels that the plate covers of others, and its place: the first with the fewest."""
    left, top, right, bottom = corners
    width, height = plate
    places = (
        (left, top - height),
        (left, top),
        (left, bottom + 1),
        (right - width + 1, top - height),
        (right - width + 1, top),
        (left, bottom - height + 1),
        (right + 1, top),
        (left - width, top),
    )
    candidates: list[tuple[int, Rectangle]] = []
    for x, y in places:
        x, y = min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))
        rectangle = (x, y, x + width - 1, y + height - 1)
        candidates.append((sum(_overlap(rectangle, other) for other in taken), rectangle))
    return min(candidates, key=lambda candidate: candidate[0])


def _overlap(one: Rectangle, other: Rectangle) -> int:
    width = min(one[2], other[2]) - max(one[0], other[0]) + 1
    height = min(one[3], other[3]) - max(one[1], other[1]) + 1
    return max(width, 0) * max(height, 0)
