"""Names on a picture, each on a plate of its class's colour where it hides the fewest of those already written."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]  # R, G, B, 0 to 255
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels, inclusive


class Labels:
    """Writes names; those written first get the best places.

    Args:
        canvas: of the picture.
        size: width and height of the picture in pixels.
    """

    def __init__(self, canvas: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
        self.canvas, self.size = canvas, size
        self.font = ImageFont.load_default(size=min(max(round(max(size) / 55), 12), 28))
        self.taken: list[Rectangle] = []
        self.named: set[Colour] = set()

    def draw(self, text: str, colour: Colour, corners: Rectangle) -> None:
        """Write `text` at the box, unless there is no room for it and its colour has been named."""
        left, _, right, _ = (round(value) for value in self.canvas.textbbox((0, 0), text, font=self.font))
        # A plate of a full line's height, whatever the letters, so that plates in a row align.
        line = round(self.canvas.textbbox((0, 0), "Ag", font=self.font)[3])
        margin = max(2, line // 5)
        plate = (right - left + 2 * margin, line + margin)
        tiny = corners[2] - corners[0] < plate[0] / 2 and corners[3] - corners[1] < plate[1] * 2
        hidden, place = _place(corners, plate, self.size, self.taken)
        if colour in self.named and (tiny or hidden > plate[0] * plate[1] / 4):
            return
        self.taken.append(place)
        self.named.add(colour)
        self.canvas.rectangle(place, fill=colour)
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 115
        ink = (255, 255, 255) if dark else (0, 0, 0)
        self.canvas.text((place[0] + margin - left, place[1] + margin // 2 - 1), text, fill=ink, font=self.font)


def _place(
    corners: Rectangle, plate: tuple[int, int], size: tuple[int, int], taken: Sequence[Rectangle]
) -> tuple[int, Rectangle]:
    """The first free place around the box, else the one that hides the least; and how many pixels it hides."""
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
    candidates: list[tuple[int, int, Rectangle]] = []
    for rank, (x, y) in enumerate(places):
        x, y = min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))
        rectangle = (x, y, x + width - 1, y + height - 1)
        candidates.append((sum(_overlap(rectangle, other) for other in taken), rank, rectangle))
    hidden, _, rectangle = min(candidates)
    return hidden, rectangle


def _overlap(one: Rectangle, other: Rectangle) -> int:
    width = min(one[2], other[2]) - max(one[0], other[0]) + 1
    height = min(one[3], other[3]) - max(one[1], other[1]) + 1
    return max(width, 0) * max(height, 0)
