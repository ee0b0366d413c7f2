"""Annotated images and detections made of rectangles, by hand or at random."""

from typing import Any, TypeVar

import numpy as np

from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from trainer.metrics.metric import PerImageMetric
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.inference import Detections

PERSON, CAR, MAN = 1, 2, 5
CATEGORIES = (Category(PERSON, "Person", "/m/p"), Category(CAR, "Car", "/m/c"), Category(MAN, "Man", "/m/m"))
SIZE = 200
Box = tuple[float, float, float, float]  # x, y, w, h
Pair = tuple[Sample, Detections]
Result = TypeVar("Result")


def filled(box: Box) -> rle.Rle:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    left, top, right, bottom = (max(round(v), 0) for v in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    mask[top:bottom, left:right] = 1
    return rle.encode(mask)


def instance(label: int, box: Box, *, mask: bool = True, group: bool = False) -> Instance:
    x, y, w, h = map(float, box)
    return Instance(label, (x, y, w, h), filled(box) if mask else None, is_group_of=group)


def sample(
    *instances: Instance, name: str = "a", present: tuple[int, ...] = (), absent: tuple[int, ...] = ()
) -> Sample:
    return Sample(name, b"", SIZE, SIZE, instances, verified_present=present, verified_absent=absent)


def found(*entries: tuple[int, Box, float]) -> Detections:
    boxes = np.array([(x, y, x + w, y + h) for _, (x, y, w, h), _ in entries], np.float32).reshape(-1, 4)
    labels, scores = np.array([e[0] for e in entries], np.int64), np.array([e[2] for e in entries], np.float32)
    return Detections(boxes, labels, scores, tuple(filled(box) for _, box, _ in entries))


def evaluate(metric: PerImageMetric[Any, Result], *pairs: Pair) -> Result:
    metric.process([EvaluatedImage(*pair) for pair in pairs])
    result = metric.evaluate()
    assert result is not None
    return result


def random_pairs(seed: int, images: int) -> list[Pair]:
    """Overlapping objects of all sizes, groups, boxes without masks; detections near and far, and equal scores."""
    rng: np.random.Generator = np.random.default_rng(seed)

    def label() -> int:
        return int(rng.choice([PERSON, CAR, MAN]))

    def box() -> Box:
        side = float(rng.choice([20.0, 60.0, 120.0]))
        (x, y), (w, h) = rng.uniform(0, SIZE - side, 2), side * rng.uniform(0.6, 1.0, 2)
        return float(x), float(y), float(w), float(h)

    def near(one: Instance) -> Box:
        x, y, w, h = one.bbox
        (dx, dy), (sx, sy) = rng.normal(0, 0.1, 2) * (w, h), rng.uniform(0.8, 1.2, 2)
        return float(x + dx), float(y + dy), float(w * sx), float(h * sy)

    pairs = []
    for number in rng.permutation(images):
        objects = [
            instance(label(), box(), mask=bool(rng.random() < 0.6), group=bool(rng.random() < 0.2))
            for _ in range(rng.integers(0, 7))
        ]
        entries = [(one.category_id if rng.random() < 0.8 else label(), near(one)) for one in objects * 2]
        entries += [(label(), box()) for _ in range(rng.integers(0, 4))]
        verified = dict(zip((PERSON, CAR, MAN), rng.random(3), strict=True))
        present = tuple(c for c, value in verified.items() if value < 0.3)
        absent = tuple(c for c, value in verified.items() if value > 0.8)
        one = sample(*objects, name=f"image{number:03d}", present=present, absent=absent)
        pairs.append((one, found(*((c, b, round(float(rng.random()), 2)) for c, b in entries))))
    return pairs
