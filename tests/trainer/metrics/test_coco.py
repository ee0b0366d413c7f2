"""`CocoMetric`: cases worked by hand, and a comparison with pycocotools' own loading of results."""

from dataclasses import replace

import numpy as np
import pytest

from shards.format import rle
from shards.format.sample import Instance
from tests.trainer.metrics.reference import pycocotools_stats
from tests.trainer.metrics.scenes import CATEGORIES, Pair, evaluate, found, instance, random_pairs, sample
from trainer.metrics.coco import SUMMARY, CocoMetric, CocoResult, Scores


def score(*pairs: Pair) -> CocoResult:
    return evaluate(CocoMetric(CATEGORIES), *pairs)


def numbers(scores: Scores) -> list[float]:
    return [-1.0 if getattr(scores, name) is None else getattr(scores, name) for name in SUMMARY]


def test_agrees_with_pycocotools_by_load_res(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = sorted(random_pairs(3, 25), key=lambda pair: pair[0].image_id)
    result = score(*pairs)
    assert numbers(result.bbox) == pytest.approx(pycocotools_stats("bbox", pairs, CATEGORIES), abs=1e-9)
    assert numbers(result.segm) == pytest.approx(pycocotools_stats("segm", pairs, CATEGORIES), abs=1e-9)
    assert 0.05 < (result.segm.ap or 0) < 0.95
    assert np.mean([c.ap for c in result.segm.classes]) == pytest.approx(result.segm.ap)
    assert np.mean([c.ap50 for c in result.bbox.classes]) == pytest.approx(result.bbox.ap50)
    assert capsys.readouterr().out == ""


def test_small_medium_and_large_are_by_the_area_of_the_annotation_then_the_mask_then_the_box() -> None:
    box = (20.0, 20.0, 40.0, 40.0)  # medium
    detections = found((1, box, 0.9))
    thin = replace(instance(1, box), segmentation=rle.encode(np.eye(200)))  # of 200 pixels

    def sizes(one: Instance) -> list[str]:
        boxes = score((replace(sample(one), width=200, height=200), detections)).bbox
        return [name for name in ("small", "medium", "large") if getattr(boxes, f"ap_{name}") is not None]

    assert sizes(instance(1, box, mask=False)) == ["medium"]
    assert sizes(thin) == ["small"]
    assert sizes(replace(thin, area=10_000.0)) == ["large"]


def test_a_detection_without_a_pixel_is_small_for_masks_as_for_pycocotools() -> None:
    box = (20.0, 20.0, 20.0, 20.0)
    detections = found((1, box, 0.8), (1, (50.0, 50.0, 100.0, 100.0), 0.9))
    nothing = rle.encode(np.zeros((200, 200), np.uint8))
    pairs = [(sample(instance(1, box)), replace(detections, masks=(detections.masks[0], nothing)))]
    result = score(*pairs)
    assert result.segm.ap_small == pytest.approx(0.5)
    assert numbers(result.bbox) == pytest.approx(pycocotools_stats("bbox", pairs, CATEGORIES), abs=1e-9)
    assert numbers(result.segm) == pytest.approx(pycocotools_stats("segm", pairs, CATEGORIES), abs=1e-9)


def test_perfect_detections_and_none() -> None:
    boxes = (20.0, 30.0, 50.0, 60.0), (100.0, 100.0, 20.0, 20.0)
    one = sample(instance(1, boxes[0]), instance(2, boxes[1]))
    perfect = score((one, found((1, boxes[0], 0.9), (2, boxes[1], 0.8))))
    assert (perfect.bbox.ap, perfect.segm.ap, perfect.bbox.ap_small) == pytest.approx((1, 1, 1))
    assert perfect.bbox.ap_large is None
    classes = [(c.name, c.ap and round(c.ap, 9), c.ap50 and round(c.ap50, 9)) for c in perfect.segm.classes]
    assert classes == [("Person", 1, 1), ("Car", 1, 1), ("Man", None, None)]
    nothing = score((one, found()))
    assert (nothing.bbox.ap, nothing.segm.ap, nothing.detections) == (0, 0, 0)
    empty = score((sample(), found()))
    assert (empty.bbox.ap, empty.segm.ap, empty.images) == (None, None, 1)


def test_a_box_without_a_mask_counts_for_boxes_only() -> None:
    masked, unmasked = (20.0, 20.0, 50.0, 50.0), (100.0, 100.0, 50.0, 50.0)
    one = sample(instance(1, masked), instance(1, unmasked, mask=False))
    result = score((one, found((1, masked, 0.9))))
    assert (result.boxes, result.masks) == (2, 1)
    assert (result.segm.ar100, result.bbox.ar100) == (1, 0.5)


@pytest.mark.parametrize("mask", [True, False])
def test_detections_in_a_group_are_ignored(mask: bool) -> None:
    box, group = (10.0, 10.0, 40.0, 40.0), (80.0, 80.0, 110.0, 110.0)
    inside = found((1, (110.0, 110.0, 40.0, 40.0), 0.95), (1, box, 0.9))
    result = score((sample(instance(1, box), instance(1, group, mask=mask, group=True)), inside))
    assert (result.bbox.ap, result.segm.ap) == pytest.approx((1, 1))
    assert (result.boxes, result.masks) == (1, 1)
    without = score((sample(instance(1, box)), inside))
    assert max(without.bbox.ap or 0, without.segm.ap or 0) < 0.6
