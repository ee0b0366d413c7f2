"""A canvas that records which object owns each pixel, and functions that paint people, vehicles, lights and signs.

The functions take the position and size of the object in image pixels, as floats, and a random number generator.
"""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

_FINE = 2  # colours are drawn at twice the size and reduced, which smooths the edges
SKIN: tuple[Colour, ...] = ((244, 209, 178), (224, 178, 140), (176, 124, 88), (128, 84, 58), (92, 60, 44))
HAIR: tuple[Colour, ...] = ((30, 24, 22), (70, 46, 30), (120, 84, 48), (196, 160, 96), (150, 150, 150))
_GLASS: Colour = (96, 122, 140)
_TYRE: Colour = (24, 24, 26)


class Canvas:
    """A picture of `width` x `height` pixels, and the id of the object that is visible at each pixel.

    `owner` is the id that drawing records: 0 for the background, None to change colours only.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.owner: int | None = 0
        self._picture = Image.new("RGB", (width * _FINE, height * _FINE))
        self._owners = Image.new("L", (width, height), 0)
        self._colours = ImageDraw.Draw(self._picture)
        self._ids = ImageDraw.Draw(self._owners)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Draw a filled polygon."""
        self._colours.polygon([(x * _FINE, y * _FINE) for x, y in points], fill=colour)
        if self.owner is not None:
            self._ids.polygon([(x - 0.25, y - 0.25) for x, y in points], fill=self.owner)

    def rectangle(
        self, left: float, top: float, right: float, bottom: float, colour: Colour, radius: float = 0.0
    ) -> None:
        """Draw a filled rectangle with rounded corners of `radius` pixels."""
        right, bottom = max(right, left + 0.5), max(bottom, top + 0.5)
        fine = [left * _FINE, top * _FINE, right * _FINE - 1, bottom * _FINE - 1]
        self._colours.rounded_rectangle(
            [fine[0], fine[1], max(fine[2:3] + fine[:1]), max(fine[3], fine[1])], radius * _FINE, colour
        )
        if self.owner is not None:
            box = [round(left), round(top), max(round(right) - 1, round(left)), max(round(bottom) - 1, round(top))]
            self._ids.rounded_rectangle(box, radius, self.owner)

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> None:
        """Draw a filled ellipse around (x, y)."""
        fine = [(x - radius_x) * _FINE, (y - radius_y) * _FINE, (x + radius_x) * _FINE - 1, (y + radius_y) * _FINE - 1]
        self._colours.ellipse([fine[0], fine[1], max(fine[0], fine[2]), max(fine[1], fine[3])], fill=colour)
        if self.owner is not None:
            box = [x - radius_x, y - radius_y, x + radius_x - 1, y + radius_y - 1]
            self._ids.ellipse([box[0], box[1], max(box[0], box[2]), max(box[1], box[3])], fill=self.owner)

    def limb(self, start: Point, end: Point, thickness: float, colour: Colour) -> None:
        """Draw a straight thick line with round ends."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = math.hypot(dx, dy) or 1.0
        ox, oy = -dy / length * thickness / 2, dx / length * thickness / 2
        (x0, y0), (x1, y1) = start, end
        self.polygon([(x0 + ox, y0 + oy), (x1 + ox, y1 + oy), (x1 - ox, y1 - oy), (x0 - ox, y0 - oy)], colour)
        for x, y in (start, end):
            self.ellipse(x, y, thickness / 2, thickness / 2, colour)

    def paste(self, pixels: NDArray[np.uint8]) -> None:
        """Cover the whole canvas with a small uint8 [h, w, 3] picture, enlarged smoothly; owners do not change."""
        self._picture.paste(Image.fromarray(pixels).resize(self._picture.size, Image.Resampling.BILINEAR))

    def owners(self) -> NDArray[np.uint8]:
        """Return the id of the visible object at each pixel, uint8 [H, W]; 0 is the background."""
        return np.array(self._owners)

    def pixels(self) -> NDArray[np.uint8]:
        """Return the picture, uint8 [H, W, 3]."""
        return np.asarray(self._picture.reduce(_FINE))


def shade(colour: Colour, factor: float) -> Colour:
    """Return the colour made lighter (factor > 1) or darker, clipped to 0..255."""
    red, green, blue = (max(0, min(255, round(channel * factor))) for channel in colour)
    return red, green, blue


def vivid(
    rng: np.random.Generator, saturation: tuple[float, float] = (0.3, 0.95), value: tuple[float, float] = (0.25, 0.95)
) -> Colour:
    """Return a random colour of any hue."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return round(red * 255), round(green * 255), round(blue * 255)


def pick(rng: np.random.Generator, colours: Sequence[Colour]) -> Colour:
    """Return one of the colours at random."""
    return colours[int(rng.integers(len(colours)))]


def ngon(x: float, y: float, radius: float, corners: int, turn: float = 0.0) -> list[Point]:
    """Return the corners of a regular polygon; `turn` is a fraction of a full turn, 0 with the first corner on top."""
    angles = [2 * math.pi * (corner / corners + turn) for corner in range(corners)]
    return [(x + radius * math.sin(angle), y - radius * math.cos(angle)) for angle in angles]


def person(canvas: Canvas, rng: np.random.Generator, x: float, base: float, height: float, kind: str) -> None:
    """Paint a Man, Woman, Boy, Girl or Person, standing or walking; x is the centre, `base` the ground."""
    child = kind in ("Boy", "Girl")
    head = height * (0.095 if child else 0.07)
    skin, hair = pick(rng, SKIN), pick(rng, HAIR)
    top, trousers, shoes = vivid(rng), vivid(rng, (0.1, 0.7), (0.12, 0.6)), shade(vivid(rng), 0.4)
    shoulders = height * rng.uniform(0.095, 0.125) * (0.9 if kind in ("Woman", "Girl") else 1.0)
    neck, hip = base - height + 2 * head, base - height * rng.uniform(0.46, 0.5)
    leg, arm = height * 0.075, height * 0.055
    stride = height * rng.uniform(0.03, 0.13)
    for side, light in ((-1, 0.8), (1, 1.0)):
        foot = (x + side * stride, base - leg * 0.3)
        canvas.limb((x + side * shoulders * 0.35, hip), foot, leg, shade(trousers, light))
        canvas.ellipse(foot[0] + leg * 0.25, base - leg * 0.3, leg * 0.75, leg * 0.38, shoes)
        swing = rng.uniform(-0.3, 1.1) * stride
        hand = (x + side * shoulders * 1.1 + swing, hip + height * rng.uniform(-0.06, 0.03))
        canvas.limb((x + side * shoulders * 0.9, neck + arm), hand, arm, shade(top, light * 0.92))
        canvas.ellipse(*hand, arm * 0.55, arm * 0.6, skin)
    canvas.rectangle(x - head * 0.4, neck - head * 0.6, x + head * 0.4, neck + head * 0.5, shade(skin, 0.85))
    waist = shoulders * rng.uniform(0.75, 0.95)
    canvas.polygon(
        [(x - shoulders, neck + head * 0.2), (x + shoulders, neck + head * 0.2), (x + waist, hip), (x - waist, hip)],
        top,
    )
    _shirt(canvas, rng, x, neck + head * 0.35, hip, waist, top)
    if kind in ("Woman", "Girl") and rng.random() < 0.6:
        hem, flare = hip + height * rng.uniform(0.12, 0.25), shoulders * rng.uniform(1.2, 1.6)
        canvas.polygon(
            [(x - waist, hip - 1), (x + waist, hip - 1), (x + flare, hem), (x - flare, hem)], pick(rng, (top, trousers))
        )
    _head(canvas, rng, x, neck - head, head, skin, hair, long_hair=kind in ("Woman", "Girl"))


def _shirt(
    canvas: Canvas, rng: np.random.Generator, x: float, top: float, bottom: float, half: float, colour: Colour
) -> None:
    """Paint stripes, an open jacket or nothing on the torso."""
    style = rng.integers(4)
    other = shade(colour, 1.5) if sum(colour) < 330 else shade(colour, 0.55)
    if style == 0:
        for y in np.linspace(top + 1, bottom - 1, 5)[::2]:
            canvas.rectangle(x - half, float(y), x + half, float(y) + (bottom - top) * 0.1, other)
    elif style == 1:
        canvas.polygon(
            [(x - half * 0.25, top), (x + half * 0.25, top), (x + half * 0.15, bottom), (x - half * 0.15, bottom)],
            other,
        )


def _head(
    canvas: Canvas,
    rng: np.random.Generator,
    x: float,
    y: float,
    radius: float,
    skin: Colour,
    hair: Colour,
    long_hair: bool,
) -> None:
    if long_hair:
        canvas.rectangle(x - radius * 0.95, y - radius * 0.4, x + radius * 0.95, y + radius * 1.4, hair, radius * 0.5)
    canvas.ellipse(x, y - radius * 0.12, radius * 0.92, radius * 0.98, hair)
    turn = rng.uniform(-0.3, 0.3) * radius
    canvas.ellipse(x + turn * 0.5, y + radius * 0.15, radius * 0.74, radius * 0.8, skin)
    if rng.random() < 0.25:  # a hat
        hat = vivid(rng)
        canvas.rectangle(x - radius * 0.9, y - radius * 1.05, x + radius * 0.9, y - radius * 0.3, hat, radius * 0.4)
        canvas.rectangle(x - radius * 1.15, y - radius * 0.4, x + radius * 1.15, y - radius * 0.2, shade(hat, 0.7))
    if radius >= 4:
        for side in (-1, 1):
            canvas.ellipse(x + turn + side * radius * 0.3, y + radius * 0.1, 0.9, 1.0, (30, 26, 26))


def car_side(
    canvas: Canvas, rng: np.random.Generator, x: float, base: float, length: float, height: float, kind: str
) -> None:
    """Paint a Car, Van or Limousine from the side; x is the centre."""
    paint = _car_paint(rng)
    left, right, top = x - length / 2, x + length / 2, base - height
    face = 1 if rng.random() < 0.5 else -1  # direction of its front
    wheel = height * (0.2 if kind == "Van" else 0.235)
    belt, sill = top + height * (0.5 if kind == "Van" else 0.42), base - wheel * 0.7

    def along(part: float) -> float:
        return x + face * (part - 0.5) * length

    roof = {"Van": (0.03, 0.07, 0.72, 0.86), "Limousine": (0.12, 0.2, 0.72, 0.82)}.get(kind, (0.1, 0.27, 0.62, 0.78))
    canvas.polygon(
        [(along(roof[0]), belt + 1), (along(roof[1]), top), (along(roof[2]), top), (along(roof[3]), belt + 1)], paint
    )
    canvas.rectangle(left, belt, right, sill, paint, height * 0.1)
    canvas.rectangle(
        left + height * 0.03, sill - height * 0.12, right - height * 0.03, sill, shade(paint, 0.6), height * 0.04
    )
    inset, panes = height * 0.06, 5 if kind == "Limousine" else 3 if kind == "Van" else 2
    for pane in range(panes):
        near, far = pane / panes, (pane + 1) / panes
        low = [along(roof[0] + (roof[3] - roof[0]) * (0.06 + 0.88 * part)) for part in (near + 0.02, far - 0.02)]
        high = [along(roof[1] + (roof[2] - roof[1]) * (0.04 + 0.92 * part)) for part in (near + 0.02, far - 0.02)]
        canvas.polygon(
            [(low[0], belt), (high[0], top + inset), (high[1], top + inset), (low[1], belt)],
            shade(_GLASS, rng.uniform(0.7, 1.2)),
        )
    canvas.rectangle(along(0.5) - 0.5, belt, along(0.5) + 0.5, sill - height * 0.1, shade(paint, 0.7))
    canvas.ellipse(along(0.97), belt + height * 0.14, height * 0.05, height * 0.06, (255, 246, 200))
    canvas.ellipse(along(0.03), belt + height * 0.14, height * 0.04, height * 0.06, (190, 24, 24))
    for part in (0.2, 0.8):
        canvas.ellipse(along(part), base - wheel, wheel, wheel, _TYRE)
        canvas.ellipse(along(part), base - wheel, wheel * 0.55, wheel * 0.55, (176, 178, 182))
        canvas.ellipse(along(part), base - wheel, wheel * 0.2, wheel * 0.2, (70, 70, 74))


def car_front(
    canvas: Canvas, rng: np.random.Generator, x: float, base: float, width: float, height: float, kind: str
) -> None:
    """Paint a Car or Van from the front or the back; x is the centre."""
    paint, front = _car_paint(rng), rng.random() < 0.5
    top, half = base - height, width / 2
    belt = top + height * (0.5 if kind == "Van" else 0.4)
    taper = 0.92 if kind == "Van" else 0.72
    for side in (-1, 1):
        edge = x + side * half * 0.76
        canvas.rectangle(edge - half * 0.16, base - height * 0.28, edge + half * 0.16, base, _TYRE, half * 0.05)
    canvas.polygon(
        [(x - half * 0.94, belt + 1), (x - half * taper, top), (x + half * taper, top), (x + half * 0.94, belt + 1)],
        paint,
    )
    glass = [(x - half * 0.8, belt), (x - half * (taper - 0.1), top + height * 0.06)]
    canvas.polygon([*glass, *((2 * x - px, py) for px, py in reversed(glass))], shade(_GLASS, rng.uniform(0.7, 1.2)))
    canvas.rectangle(x - half, belt, x + half, base - height * 0.12, paint, height * 0.08)
    canvas.rectangle(
        x - half * 0.96, base - height * 0.24, x + half * 0.96, base - height * 0.1, shade(paint, 0.6), height * 0.04
    )
    lamp: Colour = (255, 248, 214) if front else (200, 22, 22)
    for side in (-1, 1):
        canvas.ellipse(x + side * half * 0.72, belt + height * 0.16, half * 0.2, height * 0.07, lamp)
    if front:
        canvas.rectangle(x - half * 0.42, belt + height * 0.1, x + half * 0.42, belt + height * 0.22, (36, 36, 40), 1)
    canvas.rectangle(x - half * 0.24, base - height * 0.26, x + half * 0.24, base - height * 0.17, (236, 236, 226))


def _car_paint(rng: np.random.Generator) -> Colour:
    if rng.random() < 0.35:
        grey = int(rng.integers(40, 235))
        return grey, grey, min(255, grey + 6)
    return vivid(rng, (0.5, 0.95), (0.35, 0.9))


def traffic_light(canvas: Canvas, rng: np.random.Generator, x: float, top: float, height: float) -> None:
    """Paint a housing with three lamps, one of them on; x is the centre. The pole is not part of it."""
    half = height * 0.21
    body = pick(rng, ((28, 30, 30), (40, 46, 42), (190, 150, 20), (20, 26, 24)))
    if rng.random() < 0.4:
        canvas.rectangle(x - half * 1.25, top, x + half * 1.25, top + height, (226, 226, 220), half * 0.3)
        half, top, height = half * 1.05, top + height * 0.03, height * 0.94
    canvas.rectangle(x - half, top, x + half, top + height, body, half * 0.4)
    on, radius = int(rng.integers(3)), min(half * 0.72, height * 0.14)
    for lamp, colour in enumerate(((240, 40, 30), (252, 190, 30), (40, 220, 110))):
        y = top + height * (0.19 + 0.31 * lamp)
        canvas.ellipse(x, y, radius * 1.18, radius * 1.18, (12, 12, 12))
        canvas.ellipse(x, y, radius, radius, colour if lamp == on else shade(colour, 0.25))
        if lamp == on:
            canvas.ellipse(x - radius * 0.2, y - radius * 0.2, radius * 0.45, radius * 0.45, shade(colour, 1.5))


def stop_sign(canvas: Canvas, rng: np.random.Generator, x: float, y: float, radius: float) -> None:
    """Paint a red octagon with a white rim and four white letters; the pole is not part of it."""
    red = shade((196, 24, 32), rng.uniform(0.8, 1.15))
    canvas.polygon(ngon(x, y, radius, 8, 1 / 16), (240, 240, 240))
    canvas.polygon(ngon(x, y, radius * 0.9, 8, 1 / 16), red)
    tall, wide = radius * 0.26, radius * 0.3
    for letter in range(4):
        middle = x + (letter - 1.5) * radius * 0.4
        canvas.rectangle(middle - wide / 2, y - tall, middle + wide / 2, y + tall, (244, 244, 244), wide * 0.2)
        if letter != 1:  # the T is a bar, the others have a hole
            canvas.rectangle(middle - wide * 0.15, y - tall * 0.55, middle + wide * 0.25, y - tall * 0.1, red)


def traffic_sign(canvas: Canvas, rng: np.random.Generator, x: float, y: float, radius: float) -> None:
    """Paint a triangle, disc, diamond or square with a symbol; the pole is not part of it."""
    red, blue, white, ink = (204, 28, 34), (24, 84, 176), (242, 242, 240), (24, 24, 28)
    style = int(rng.integers(6))
    if style == 0:  # a warning
        canvas.polygon(ngon(x, y + radius * 0.2, radius * 1.15, 3), red)
        canvas.polygon(ngon(x, y + radius * 0.2, radius * 0.72, 3), pick(rng, (white, (250, 214, 60))))
        canvas.rectangle(x - radius * 0.08, y - radius * 0.15, x + radius * 0.08, y + radius * 0.45, ink)
    elif style in (1, 2):  # a limit, no entry
        canvas.ellipse(x, y, radius, radius, red)
        if style == 1:
            canvas.ellipse(x, y, radius * 0.74, radius * 0.74, white)
            for side in (-1, 1):
                canvas.rectangle(
                    x + side * radius * 0.27 - radius * 0.17,
                    y - radius * 0.36,
                    x + side * radius * 0.27 + radius * 0.17,
                    y + radius * 0.36,
                    ink,
                )
        else:
            canvas.rectangle(x - radius * 0.68, y - radius * 0.18, x + radius * 0.68, y + radius * 0.18, white)
    elif style == 3:  # a diamond
        canvas.polygon(ngon(x, y, radius * 1.1, 4), ink)
        canvas.polygon(ngon(x, y, radius * 1.0, 4), (248, 200, 40))
        canvas.limb((x, y + radius * 0.45), (x, y - radius * 0.4), radius * 0.16, ink)
    else:  # a blue disc or square with a white arrow
        if style == 4:
            canvas.ellipse(x, y, radius, radius, blue)
        else:
            canvas.rectangle(
                x - radius * 0.9, y - radius * 0.9, x + radius * 0.9, y + radius * 0.9, blue, radius * 0.12
            )
        canvas.limb((x, y + radius * 0.5), (x, y - radius * 0.1), radius * 0.22, white)
        canvas.polygon(
            [(x, y - radius * 0.65), (x + radius * 0.42, y - radius * 0.05), (x - radius * 0.42, y - radius * 0.05)],
            white,
        )
