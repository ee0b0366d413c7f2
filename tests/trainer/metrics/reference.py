"""Slow or independent versions of the metrics."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from trainer.metrics.coco import Task, ground_truth
from trainer.model.inference import Detections

Pairs = Sequence[tuple[Sample, Detections]]


def pycocotools_stats(task: Task, pairs: Pairs, categories: Sequence[Category]) -> NDArray[np.float64]:
    """COCO's twelve numbers by `loadRes`, all images at once."""
    truth: list[dict] = []
    found: list[dict] = []
    for number, (sample, detections) in enumerate(pairs, start=1):
        for obj in sample.instances:
            annotation = ground_truth(task, obj, sample.height, sample.width)
            if annotation is not None:
                truth.append({**annotation, "id": len(truth) + 1, "image_id": number})
        for obj, score in zip(detections.instances(), detections.scores, strict=True):
            entry: dict = {"image_id": number, "category_id": obj.category_id, "score": float(score)}
            assert obj.segmentation is not None
            entry |= {"bbox": list(obj.bbox)} if task == "bbox" else {"segmentation": obj.segmentation.to_coco()}
            found.append(entry)
    coco = COCO()
    images = [{"id": i, "width": one.width, "height": one.height} for i, (one, _) in enumerate(pairs, start=1)]
    classes = [{"id": c.id, "name": c.name} for c in categories]
    coco.dataset = {"images": images, "categories": classes, "annotations": truth, "info": {}}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats)


def open_images_ap(pairs: Pairs, label: int, children: set[int]) -> float | None:
    """The Open Images AP of one class, by loops over pixels and objects."""
    verdicts: list[tuple[float, bool]] = []
    total = 0
    for sample, detections in sorted(pairs, key=lambda pair: pair[0].image_id):
        truth = [i for i in sample.instances if i.category_id in {label, *children}]
        total += sum(i.segmentation is not None and not i.is_group_of for i in truth)
        verified = {label, *children} & set(sample.verified_present) or label in sample.verified_absent
        if truth or verified:
            verdicts += _verdicts(detections, truth, {label, *children})
    if not total:
        return None
    verdicts.sort(key=lambda v: -v[0])
    hits = [sum(right for _, right in verdicts[: k + 1]) for k in range(len(verdicts))]
    area, before = 0.0, 0.0
    for k in range(len(verdicts)):
        recall = hits[k] / total
        area += (recall - before) * max(hits[n] / (n + 1) for n in range(k, len(verdicts)))
        before = recall
    return area


def _verdicts(detections: Detections, truth: list[Instance], kinds: set[int]) -> list[tuple[float, bool]]:
    """Score, and whether right, of each detection that counts."""
    masks = [rle.decode(mask) > 0 for mask in detections.masks]
    mine = [k for k in range(len(detections)) if int(detections.labels[k]) in kinds]
    mine.sort(key=lambda k: -float(detections.scores[k]))
    state: dict[int, str] = {}
    # Masks, groups with masks, boxes, groups with boxes: in this order.
    for masked in (True, False):
        taken: list[int] = []
        for k in mine:
            best, most = None, 0.0
            for j, obj in enumerate(truth):
                if (obj.segmentation is not None) == masked and not obj.is_group_of:
                    value = overlap(masks[k], obj)
                    if value > most:
                        best, most = j, value
            if k not in state and best is not None and most >= 0.5 and best not in taken:
                taken.append(best)
                state[k] = "right" if masked else "out"
        for k in mine:
            for obj in truth:
                region = (obj.segmentation is not None) == masked and obj.is_group_of
                if region and k not in state and overlap(masks[k], obj) >= 0.5:
                    state[k] = "out"
    return [(float(detections.scores[k]), state.get(k) == "right") for k in mine if state.get(k) != "out"]


def overlap(mask: NDArray[np.bool_], annotation: Instance) -> float:
    """IoU, of a group-of region the share of `mask` inside; of boxes if the annotation has no mask."""
    if annotation.segmentation is not None:
        other = rle.decode(annotation.segmentation) > 0
        both, own, area = float((mask & other).sum()), float(mask.sum()), float(other.sum())
    else:
        rows, columns = np.nonzero(mask)
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        x, y, w, h = annotation.bbox
        both = max(min(right, x + w) - max(left, x), 0) * max(min(bottom, y + h) - max(top, y), 0)
        own, area = float((right - left) * (bottom - top)), w * h
    return both / own if annotation.is_group_of else both / (own + area - both)
