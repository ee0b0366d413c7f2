"""`CocoMetric`: cases worked by hand, and a comparison with pycocotools' own loading of results."""

import numpy as np
import pytest
from numpy.typing import NDArray

from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from tests.trainer.metrics.reference import pycocotools_stats
from trainer.metrics.coco import SUMMARY, CocoMetric, CocoResult, Scores
from trainer.metrics.overlaps import Comparison
from trainer.model.inference import Detections

CATEGORIES = (Category(1, "Person", "/m/p"), Category(2, "Car", "/m/c"), Category(5, "Sign", "/m/s"))
SIZE = 200


def disc(x: float, y: float, w: float, h: float) -> NDArray[np.bool_]:
    """An ellipse that fills a box."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def instance(
    category: int, box: tuple[float, float, float, float], *, mask: bool = True, group: bool = False
) -> Instance:
    return Instance(category, box, rle.encode(disc(*box)) if mask else None, is_group_of=group)


def sample(image_id: str, *instances: Instance) -> Sample:
    return Sample(image_id, b"", SIZE, SIZE, instances)


def detections(*found: tuple[int, tuple[float, float, float, float], float]) -> Detections:
    boxes = np.array([(x, y, x + w, y + h) for _, (x, y, w, h), _ in found], np.float32).reshape(-1, 4)
    labels, scores = np.array([c for c, _, _ in found], np.int64), np.array([s for _, _, s in found], np.float32)
    return Detections(boxes, labels, scores, tuple(rle.encode(disc(*box)) for _, box, _ in found))


def score(*pairs: tuple[Sample, Detections]) -> CocoResult:
    metric = CocoMetric(CATEGORIES)
    metric.process([Comparison(*pair) for pair in pairs])
    result = metric.evaluate()
    assert result is not None
    return result


def random_pairs(images: int = 25) -> list[tuple[Sample, Detections]]:
    """Objects of all sizes, groups, boxes without masks; detections near, far, duplicate, of the wrong class."""
    rng = np.random.default_rng(3)
    pairs = []
    for number in range(images):
        objects, found = [], []
        for _ in range(int(rng.integers(0, 7))):
            side = rng.choice([20.0, 60.0, 120.0])
            (x, y), (w, h) = rng.uniform(0, SIZE - side, 2), side * rng.uniform(0.6, 1.0, 2)
            category = int(rng.choice([1, 2, 5]))
            objects.append(instance(category, (x, y, w, h), mask=rng.random() < 0.8, group=rng.random() < 0.1))
            for _ in range(int(rng.integers(0, 3))):
                dx, dy = rng.normal(0, 0.06 * side, 2)
                near = (x + dx, y + dy, w * rng.uniform(0.9, 1.1), h * rng.uniform(0.9, 1.1))
                found.append((category if rng.random() < 0.9 else 1, near, float(rng.random())))
        if rng.random() < 0.5:
            found.append((int(rng.choice([1, 2, 5])), (5.0, 5.0, 30.0, 30.0), float(rng.random())))
        pairs.append((sample(f"image{number:03d}", *objects), detections(*found)))
    return pairs


def numbers(scores: Scores) -> list[float]:
    return [-1.0 if getattr(scores, name) is None else getattr(scores, name) for name in SUMMARY]


def test_agrees_with_pycocotools_by_load_res(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = random_pairs()
    result = score(*pairs)
    assert numbers(result.bbox) == pytest.approx(pycocotools_stats("bbox", pairs, CATEGORIES), abs=1e-9)
    assert numbers(result.segm) == pytest.approx(pycocotools_stats("segm", pairs, CATEGORIES), abs=1e-9)
    assert 0.05 < (result.segm.ap or 0) < 0.95
    assert np.mean([c.ap for c in result.segm.classes]) == pytest.approx(result.segm.ap)
    assert np.mean([c.ap50 for c in result.bbox.classes]) == pytest.approx(result.bbox.ap50)
    assert capsys.readouterr().out == ""


def test_perfect_detections_and_none() -> None:
    boxes = (20.0, 30.0, 50.0, 60.0), (100.0, 100.0, 20.0, 20.0)
    one = sample("a", instance(1, boxes[0]), instance(2, boxes[1]))
    perfect = score((one, detections((1, boxes[0], 0.9), (2, boxes[1], 0.8))))
    assert (perfect.bbox.ap, perfect.segm.ap, perfect.bbox.ap_small) == pytest.approx((1, 1, 1))
    assert perfect.bbox.ap_large is None
    classes = [(c.name, c.ap and round(c.ap, 9), c.ap50 and round(c.ap50, 9)) for c in perfect.segm.classes]
    assert classes == [("Person", 1, 1), ("Car", 1, 1), ("Sign", None, None)]
    nothing = score((one, detections()))
    assert (nothing.bbox.ap, nothing.segm.ap, nothing.detections) == (0, 0, 0)
    empty = score((sample("a"), detections()))
    assert (empty.bbox.ap, empty.segm.ap, empty.images) == (None, None, 1)


def test_a_box_without_a_mask_counts_for_boxes_only() -> None:
    masked, unmasked = (20.0, 20.0, 50.0, 50.0), (100.0, 100.0, 50.0, 50.0)
    one = sample("a", instance(1, masked), instance(1, unmasked, mask=False))
    result = score((one, detections((1, masked, 0.9))))
    assert (result.boxes, result.masks) == (2, 1)
    assert (result.segm.ar100, result.bbox.ar100) == (1, 0.5)


@pytest.mark.parametrize("mask", [True, False])
def test_detections_in_a_group_are_ignored(mask: bool) -> None:
    box, group = (10.0, 10.0, 40.0, 40.0), (80.0, 80.0, 110.0, 110.0)
    found = detections((1, (110.0, 110.0, 40.0, 40.0), 0.95), (1, box, 0.9))
    result = score((sample("a", instance(1, box), instance(1, group, mask=mask, group=True)), found))
    assert (result.bbox.ap, result.segm.ap) == pytest.approx((1, 1))
    assert (result.boxes, result.masks) == (1, 1)
    without = score((sample("a", instance(1, box)), found))
    assert max(without.bbox.ap or 0, without.segm.ap or 0) < 0.6
