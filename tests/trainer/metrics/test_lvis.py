"""Which detections are right, wrong or ignored, compared with lvis-api on random scenes of federated labels."""

import logging
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from shards.format import rle
from shards.format.sample import Instance, Sample
from trainer.metrics.confusion import matched_classes
from trainer.metrics.openimages import RIGHT, UNVERIFIED, WRONG, match
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.inference import Detections

CLASSES = 5
SIDE, CELL = 80, 20  # pixels


def rectangle(x: int, y: int, w: int, h: int) -> rle.Rle:
    bits = np.zeros((SIDE, SIDE), np.bool_)
    bits[y : y + h, x : x + w] = True
    return rle.encode(bits)


def scene(number: int) -> EvaluatedImage:
    """Objects in cells of a grid, so that a detection matches one of them at most; a class has one of four states."""
    rng = np.random.default_rng(number)
    states = dict(enumerate(rng.choice(["complete", "partial", "absent", "unknown"], CLASSES), start=1))
    instances, found = [], []
    for cell in range(16):
        x, y = CELL * (cell % 4), CELL * (cell // 4)
        category = int(rng.integers(1, CLASSES + 1))
        if states[category] in ("complete", "partial") and rng.random() < 0.6:
            mask = rectangle(x, y, 14, 14)
            instances.append(Instance(category, rle.bounds(mask), mask))
        for _ in range(int(rng.integers(0, 3))):
            label = category if rng.random() < 0.7 else int(rng.integers(1, CLASSES + 1))
            dx, dy = (int(shift) for shift in rng.integers(0, 6, 2))
            found.append((label, float(np.float32(rng.random())), rectangle(x + dx, y + dy, 14, 14)))
    of = {state: tuple(c for c, own in states.items() if own == state) for state in set(states.values())}
    present = {instance.category_id for instance in instances}
    sample = Sample(
        f"{number:04d}",
        b"",
        SIDE,
        SIDE,
        tuple(instances),
        tuple(sorted(present)),
        of.get("absent", ()),
        tuple(c for c in of.get("partial", ()) if c in present),
    )
    boxes = np.array([rle.bounds(mask) for _, _, mask in found], np.float32).reshape(-1, 4)
    labels = np.array([label for label, _, _ in found], np.int64)
    scores = np.array([score for _, score, _ in found], np.float32)
    return EvaluatedImage(sample, Detections(boxes, labels, scores, tuple(mask for _, _, mask in found)))


def by_lvis(images: list[EvaluatedImage]) -> list[list[int]]:
    """Return the outcome of each detection of each image by lvis-api, at IoU 0.5 of masks."""
    from lvis.eval import LVISEval
    from lvis.lvis import LVIS

    truth: dict[str, list[Any]] = {"images": [], "annotations": []}
    truth["categories"] = [{"id": number, "frequency": "f"} for number in range(1, CLASSES + 1)]
    results: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        lists = {"neg_category_ids": image.sample.verified_absent}
        lists["not_exhaustive_category_ids"] = image.sample.not_exhaustive
        truth["images"].append({"id": number, "width": SIDE, "height": SIDE, **lists})
        for one in image.sample.instances:
            assert one.segmentation is not None
            mask = {"segmentation": one.segmentation.to_json(), "area": one.coco_area(), "bbox": list(one.bbox)}
            ids = {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": one.category_id}
            truth["annotations"].append({**ids, **mask})
        detections = image.detections
        for label, score, found in zip(detections.labels, detections.scores, detections.masks, strict=True):
            one_found = {"image_id": number, "category_id": int(label), "segmentation": found.to_json()}
            results.append({**one_found, "score": float(score)})
    gt = LVIS.__new__(LVIS)  # its constructor reads a file
    gt.logger, gt.dataset = logging.getLogger("lvis"), truth
    gt._create_index()
    evaluation = LVISEval(gt, results)
    evaluation.params.iou_thrs = np.array([0.5])
    evaluation.params.area_rng = evaluation.params.area_rng[:1]
    evaluation.evaluate()
    outcomes = [UNVERIFIED] * len(results)
    for one in filter(None, evaluation.eval_imgs):
        for found_id, matched, ignored in zip(one["dt_ids"], one["dt_matches"][0], one["dt_ignore"][0], strict=True):
            outcomes[found_id - 1] = UNVERIFIED if ignored else RIGHT if matched else WRONG
    ends = np.cumsum([0, *(len(image.detections.labels) for image in images)])
    return [outcomes[start:end] for start, end in pairwise(ends)]


def test_outcomes_agree_with_lvis_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", ModuleType("cv2"))  # only draws
    pytest.importorskip("lvis")
    images = [scene(number) for number in range(60)]
    wanted = by_lvis(images)
    seen = set()
    for image, outcomes in zip(images, wanted, strict=True):
        found = match(image, {})
        assert dict(zip(found.detections.tolist(), found.outcomes.tolist())) == dict(enumerate(outcomes))
        partial = set(image.sample.not_exhaustive)
        seen |= {(outcome, label in partial) for outcome, label in zip(outcomes, image.detections.labels.tolist())}
        wrong = sum(outcome == WRONG for outcome in outcomes)
        assert sum(annotated == 0 for annotated, _ in matched_classes(image, 0.0)) <= wrong
    assert seen == {(RIGHT, False), (RIGHT, True), (WRONG, False), (UNVERIFIED, False), (UNVERIFIED, True)}
