"""Draw a street scene: sky, buildings and a road, with people, cars, traffic lights and signs that have exact masks.

Sizes follow the perspective of a pedestrian: small objects are near the horizon, large ones near the lower edge.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo import paint
from demo.paint import Canvas, Colour

# MIDs in Open Images (class-descriptions-boxable.csv) of the classes that are drawn.
MIDS = {
    "Person": "/m/01g317",
    "Man": "/m/04yx4",
    "Woman": "/m/03bt1vf",
    "Boy": "/m/01bl7v",
    "Girl": "/m/05r655",
    "Car": "/m/0k4j",
    "Van": "/m/0h2r6",
    "Limousine": "/m/01lcw4",
    "Traffic light": "/m/015qff",
    "Traffic sign": "/m/01mqdt",
    "Stop sign": "/m/02pv19",
}
# Pixels; an object with a smaller visible area is dropped (in Open Images nothing under 40x80 has a mask).
MIN_VISIBLE = 30

_PEOPLE = (("Man", 0.32), ("Woman", 0.3), ("Person", 0.22), ("Boy", 0.08), ("Girl", 0.08))
_CARS = (("Car", 0.74), ("Van", 0.18), ("Limousine", 0.08))
_SIGNS = (("Traffic sign", 0.6), ("Stop sign", 0.4))
_KINDS = (("person", 0.34), ("car", 0.25), ("light", 0.2), ("sign", 0.21))
_COUNTS = (0.16, 0.26, 0.28, 0.2, 0.1)  # of 1 to 5 objects


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        label_mid, name: its most specific class.
        mask: bool [H, W], the pixels where it is visible; masks never overlap.
        box: (left, top, right, bottom) of the mask in pixels, right and bottom exclusive.
        is_occluded: another object or a pole hides a part.
        is_truncated: it touches the picture's edge.
        is_group_of: a crowd of people who touch; the mask covers all of them.
    """

    label_mid: str
    name: str
    mask: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    is_occluded: bool = False
    is_truncated: bool = False
    is_group_of: bool = False


@dataclass(frozen=True)
class Scene:
    """One picture and its objects.

    Attributes:
        image: uint8 [H, W, 3] RGB.
        objects: from the farthest to the nearest.
        slivers: MIDs of objects with a visible area under `MIN_VISIBLE`, whose class is therefore not verified.
    """

    image: NDArray[np.uint8]
    objects: list[SceneObject]
    slivers: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """An object before it is drawn: centre x, ground y, width and height in pixels."""

    kind: str
    name: str
    x: float
    base: float
    width: float
    height: float

    def overlap(self, other: "_Plan") -> float:
        """Return the intersection as a fraction of the smaller box."""
        across = min(self.x + self.width / 2, other.x + other.width / 2) - max(
            self.x - self.width / 2, other.x - other.width / 2
        )
        down = min(self.base, other.base) - max(self.base - self.height, other.base - other.height)
        return max(0.0, across) * max(0.0, down) / min(self.width * self.height, other.width * other.height)


def draw_scene(rng: np.random.Generator, width: int, height: int, group_fraction: float = 0.1) -> Scene:
    """Draw a scene of 1 to 5 objects. Poles of lights and signs belong to the background.

    Args:
        rng: the scene is a pure function of its state.
        width: in pixels, at least 64.
        height: likewise.
        group_fraction: share of scenes that contain a crowd as well.

    Raises:
        ValueError: the picture is too small.
    """
    if min(width, height) < 64:
        raise ValueError(f"draw_scene: {width}x{height} pixels is too small for a street; give at least 64x64")
    canvas = Canvas(width, height)
    horizon = height * rng.uniform(0.4, 0.5)
    _backdrop(canvas, rng, horizon)
    plans = _arrange(rng, width, height, horizon, crowd=rng.random() < group_fraction)
    for plan in plans:
        _shadow(canvas, plan)
    painted = []
    for number, plan in enumerate(plans, start=1):
        _draw(canvas, rng, plan, number)
        painted.append(int(np.count_nonzero(canvas.owners() == number)))
    owners = canvas.owners()
    objects, slivers = [], []
    for number, plan in enumerate(plans, start=1):
        mask = owners == number
        visible = int(np.count_nonzero(mask))
        if visible < MIN_VISIBLE:
            slivers.append(MIDS[plan.name])
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        edge = box[0] == 0 or box[1] == 0 or box[2] == width or box[3] == height
        occluded = visible < 0.98 * painted[number - 1]
        objects.append(SceneObject(MIDS[plan.name], plan.name, mask, box, occluded, edge, plan.kind == "crowd"))
    return Scene(_develop(canvas.pixels(), owners, rng), objects, tuple(slivers))


def _choose(rng: np.random.Generator, choices: tuple[tuple[str, float], ...]) -> str:
    return choices[int(rng.choice(len(choices), p=[weight for _, weight in choices]))][0]


def _arrange(rng: np.random.Generator, width: int, height: int, horizon: float, crowd: bool) -> list[_Plan]:
    """Choose and place the objects, the farthest first."""
    kinds = ["crowd"] if crowd else []
    kinds += [_choose(rng, _KINDS) for _ in range(1 + int(rng.choice(len(_COUNTS), p=_COUNTS)))]
    unit = min(width, height)
    plans: list[_Plan] = []
    for kind in kinds:
        tries = [_place(rng, kind, width, height, horizon, unit) for _ in range(8)]
        overlaps = [max((plan.overlap(other) for other in plans), default=0.0) for plan in tries]
        plans.append(
            next((plan for plan, share in zip(tries, overlaps) if share < 0.3), tries[int(np.argmin(overlaps))])
        )
    return sorted(
        plans, key=lambda plan: plan.base if plan.kind in ("person", "car", "crowd") else _foot(plan, horizon)
    )


def _place(rng: np.random.Generator, kind: str, width: int, height: int, horizon: float, unit: int) -> _Plan:
    """Place an object of this kind at random: first its size, then the ground that fits the size."""
    if kind == "person":
        name, tall = _choose(rng, _PEOPLE), unit * rng.uniform(0.3, 0.8)
        tall *= 0.75 if name in ("Boy", "Girl") else 1.0
        base, wide = horizon + 0.66 * tall, tall * 0.34
    elif kind == "crowd":
        name, tall = "Person", unit * rng.uniform(0.25, 0.36)
        base, wide = horizon + 0.62 * tall, tall * 0.95
    elif kind == "car":
        name, tall = _choose(rng, _CARS), unit * rng.uniform(0.2, 0.42)
        base = horizon + 0.78 * tall
        wide = tall * (rng.uniform(1.15, 1.3) if name != "Limousine" and rng.random() < 0.4 else rng.uniform(2.2, 2.7))
        wide, tall = (wide * 1.45, tall * 0.9) if name == "Limousine" else (wide, tall * 1.3 if name == "Van" else tall)
    elif kind == "light":
        name, tall = "Traffic light", unit * rng.uniform(0.24, 0.44)
        base, wide = height * rng.uniform(0.03, 0.2) + tall, tall * 0.5
    else:
        name, tall = _choose(rng, _SIGNS), unit * rng.uniform(0.2, 0.42)
        base, wide = height * rng.uniform(0.05, 0.28) + tall, tall
    margin = min(wide * 0.38, width / 2)  # a part may be outside the picture
    return _Plan(kind, name, float(rng.uniform(margin, width - margin)), min(base, height * 1.04), wide, tall)


def _foot(plan: _Plan, horizon: float) -> float:
    """Return where the pole of a light or sign meets the ground: the larger the plate, the nearer."""
    return horizon + plan.height * 0.95


def _shadow(canvas: Canvas, plan: _Plan) -> None:
    """Darken the ground under an object; before all objects are drawn, so that no shadow covers one."""
    if plan.kind in ("person", "car", "crowd"):
        canvas.ellipse(plan.x, plan.base, plan.width * 0.54, max(1.5, plan.height * 0.05), (52, 52, 56))


def _draw(canvas: Canvas, rng: np.random.Generator, plan: _Plan, number: int) -> None:
    """Draw one object and its pole, which is background."""
    x, base, height = plan.x, plan.base, plan.height
    canvas.owner = 0
    if plan.kind in ("light", "sign"):
        thick, foot = max(1.5, height * 0.06), _foot(plan, canvas.height * 0.45)
        steel = paint.shade((118, 120, 122), rng.uniform(0.5, 1.3))
        top = base - height * 0.5 if plan.kind == "sign" else base - height * 0.1
        canvas.rectangle(x - thick / 2, top, x + thick / 2, foot, steel)
    canvas.owner = number
    if plan.kind == "person":
        paint.person(canvas, rng, x, base, height, plan.name)
    elif plan.kind == "crowd":
        people = int(rng.integers(6, 9))
        for place in rng.permutation(people):
            offset = (place / (people - 1) - 0.5) * plan.width * 0.8
            paint.person(
                canvas,
                rng,
                x + offset,
                base - rng.uniform(0, 0.04) * height,
                height * rng.uniform(0.85, 0.97),
                "Person",
            )
    elif plan.kind == "car":
        side = plan.width / height > 1.6
        (paint.car_side if side else paint.car_front)(canvas, rng, x, base, plan.width, height, plan.name)
    elif plan.kind == "light":
        paint.traffic_light(canvas, rng, x, base - height, height)
    elif plan.name == "Stop sign":
        paint.stop_sign(canvas, rng, x, base - height / 2, height / 2)
    else:
        paint.traffic_sign(canvas, rng, x, base - height / 2, height / 2)


def _backdrop(canvas: Canvas, rng: np.random.Generator, horizon: float) -> None:
    """Draw a sky with clouds, buildings and trees, pavement and a road with lines."""
    width, height = canvas.width, canvas.height
    sky = paint.pick(rng, ((120, 170, 225), (170, 195, 215), (200, 205, 210), (228, 190, 160), (96, 120, 168)))
    rows = np.linspace(0.8, 1.25, 12)[:, None, None]
    clouds = rng.uniform(0.94, 1.12, (12, 9, 1))
    canvas.paste(np.clip(np.array(sky) * rows * clouds, 0, 255).astype(np.uint8))
    left = -rng.uniform(0, 20)
    while left < width:
        wide, top = rng.uniform(0.12, 0.32) * width, horizon * rng.uniform(0.08, 0.75)
        _building(canvas, rng, left, top, left + wide, horizon + 2)
        left += wide + (rng.uniform(0, 0.08) * width if rng.random() < 0.3 else 0)
    for _ in range(int(rng.integers(0, 4))):
        _tree(canvas, rng, rng.uniform(0, width), horizon + 3, rng.uniform(0.15, 0.3) * height)
    ground = paint.shade((150, 146, 140), rng.uniform(0.75, 1.15))
    canvas.rectangle(0, horizon, width, height, ground)
    asphalt = paint.shade((92, 94, 98), rng.uniform(0.65, 1.2))
    vanishing, near = width * rng.uniform(0.25, 0.75), rng.uniform(0.5, 1.0) * width
    far = near * 0.1
    canvas.polygon(
        [
            (vanishing - far, horizon),
            (vanishing + far, horizon),
            (vanishing + near, height),
            (vanishing - near, height),
        ],
        asphalt,
    )
    _lines(canvas, rng, vanishing, near, horizon)


def _lines(canvas: Canvas, rng: np.random.Generator, vanishing: float, near: float, horizon: float) -> None:
    """Draw kerbs and a dashed centre line, which meet at the horizon."""
    height = canvas.height

    def at(across: float, down: float) -> tuple[float, float]:
        return vanishing + near * (0.1 + 0.9 * down) * across, horizon + (height - horizon) * down

    for side in (-1, 1):
        canvas.polygon([at(side * 1.0, 0), at(side * 1.06, 0), at(side * 1.06, 1), at(side * 1.0, 1)], (188, 186, 180))
    paintwork: Colour = (232, 232, 224) if rng.random() < 0.7 else (226, 190, 70)
    for dash in (0.02, 0.08, 0.18, 0.34, 0.6, 0.92):
        end = dash * 1.45
        canvas.polygon([at(-0.025, dash), at(0.025, dash), at(0.025, end), at(-0.025, end)], paintwork)


def _building(canvas: Canvas, rng: np.random.Generator, left: float, top: float, right: float, bottom: float) -> None:
    wall = paint.shade(
        paint.pick(rng, ((168, 120, 96), (190, 176, 150), (140, 146, 156), (204, 196, 186), (120, 92, 84))),
        rng.uniform(0.7, 1.1),
    )
    canvas.rectangle(left, top, right, bottom, wall)
    canvas.rectangle(left, top, right, top + 3, paint.shade(wall, 0.7))
    columns, floors = int(rng.integers(2, 6)), max(2, int((bottom - top) / rng.uniform(12, 20)))
    across, down = (right - left) / columns, (bottom - top - 5) / floors
    dark, bright = paint.shade((70, 84, 100), rng.uniform(0.7, 1.3)), (238, 214, 150)
    for column in range(columns):
        for floor in range(floors):
            x, y = left + (column + 0.25) * across, top + 5 + (floor + 0.2) * down
            canvas.rectangle(x, y, x + across * 0.5, y + down * 0.6, bright if rng.random() < 0.08 else dark)


def _tree(canvas: Canvas, rng: np.random.Generator, x: float, base: float, height: float) -> None:
    canvas.rectangle(x - height * 0.05, base - height * 0.5, x + height * 0.05, base, (86, 64, 46))
    green = paint.shade((66, 108, 54), rng.uniform(0.6, 1.3))
    for _ in range(6):
        dx, dy = rng.uniform(-0.25, 0.25, 2) * height
        radius = height * rng.uniform(0.14, 0.24)
        canvas.ellipse(x + dx, base - height * 0.7 + dy, radius, radius, paint.shade(green, rng.uniform(0.8, 1.2)))


def _develop(pixels: NDArray[np.uint8], owners: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Add uneven light, a grain per object, a colour cast, a sunny side and noise."""
    height, width = owners.shape
    light = _smooth(rng.uniform(0.84, 1.16, (7, 9)), width, height)
    grain = _smooth(rng.uniform(0.9, 1.1, (math.ceil(height / 4), math.ceil(width / 4))), width, height)
    strength = rng.uniform(0.3, 1.2, 256).astype(np.float32)[owners]
    light *= 1 + (grain - 1) * strength
    left, right = rng.uniform(0.85, 1.15, 2)
    light *= np.linspace(left, right, width, dtype=np.float32)
    cast = rng.uniform(0.92, 1.08, 3).astype(np.float32) * np.float32(rng.uniform(0.9, 1.35))
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(2, 7))
    developed: NDArray[np.float32] = pixels * light[..., None] * cast + noise
    return np.clip(developed, 0, 255).astype(np.uint8)


def _smooth(values: NDArray[np.float64], width: int, height: int) -> NDArray[np.float32]:
    """Enlarge a coarse grid to float32 [height, width]."""
    return np.array(Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
