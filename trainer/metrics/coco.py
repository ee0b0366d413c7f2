"""COCO's average precision of boxes and masks, computed by pycocotools.

Two sets of annotations are rated, because an Open Images object often has a box and no mask:
  - boxes: every annotated box counts; sizes (small, medium, large) go by the box's area;
  - masks: objects without a mask are left out. Sizes go by the mask's area. COCO's rules know no "unknown", so a
    correct detection of an object without a mask counts as an error here: read mask AP with that in mind.
A group-of region is COCO's crowd: detections in it are neither right nor wrong. Without a mask its rectangle serves.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shards import rle
from shards.dataset import Category
from shards.sample import Instance, Sample
from trainer.metrics import Gather, alone

if TYPE_CHECKING:
    from trainer.detect import Detections

Task = Literal["bbox", "segm"]


@dataclass(frozen=True, slots=True)
class ClassScores:
    """One class's average precision; None where no object of the class is annotated."""

    category_id: int
    name: str
    ap: float | None
    ap50: float | None


@dataclass(frozen=True, slots=True)
class Scores:
    """COCO's twelve numbers, 0 to 1, in COCO's order; None where nothing of that kind is annotated.

    Attributes:
        ap: average precision, averaged over IoU 0.50 to 0.95 and the classes; `ap50`, `ap75` at one IoU.
        ap_small, ap_medium, ap_large: `ap` of objects below 32 x 32, up to 96 x 96, and above 96 x 96 pixels.
        ar1, ar10, ar100: average recall with that many detections an image; `ar_small` ... as above, with 100.
        classes: one entry a class, in the dataset's order.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    classes: tuple[ClassScores, ...]


SUMMARY = tuple(item.name for item in fields(Scores) if item.name != "classes")


@dataclass(frozen=True, slots=True)
class CocoResult:
    """Box and mask scores, and over how much they were computed.

    Attributes:
        images, detections: how many were rated.
        boxes, masks: annotated objects, and those of them that have a mask; group-of regions are not counted.
    """

    bbox: Scores
    segm: Scores
    images: int
    detections: int
    boxes: int
    masks: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Image:
    """One image as it travels between ranks: annotations and detections, masks as RLE, no pixels."""

    image_id: str
    width: int
    height: int
    instances: tuple[Instance, ...]
    detections: Detections


class CocoMetric:
    """COCO AP over the images that every rank processes; each image must be processed once, on one rank.

    Memory: about 200 bytes a detection, held by every rank after gathering: some 100 MB for 5,000 images of 100.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)
        self._images: list[_Image] = []

    def reset(self) -> None:
        """Forget every image."""
        self._images = []

    def process(self, samples: Sequence[Sample], detections: Sequence[Detections]) -> None:
        """Take in images and what was found in them, in pixels of the image as stored."""
        for sample, found in zip(samples, detections, strict=True):
            self._images.append(_Image(sample.image_id, sample.width, sample.height, sample.instances, found))

    def evaluate(self, gather: Gather = alone) -> CocoResult | None:
        """The scores over all ranks' images; None on ranks that `gather` gives nothing.

        Raises:
            RuntimeError: an image was processed twice.
        """
        gathered = gather(self._images)
        if gathered is None:
            return None
        images = sorted(gathered, key=lambda image: image.image_id)
        twice = [image_id for image_id, count in Counter(image.image_id for image in images).items() if count > 1]
        if twice:
            raise RuntimeError(f"{len(twice)} images were processed more than once, such as {twice[0]}")
        objects = [i for image in images for i in image.instances if not i.is_group_of]
        return CocoResult(
            bbox=_scores("bbox", images, self.categories),
            segm=_scores("segm", images, self.categories),
            images=len(images),
            detections=sum(len(image.detections) for image in images),
            boxes=len(objects),
            masks=sum(instance.segmentation is not None for instance in objects),
        )


def ground_truth(task: Task, instance: Instance, height: int, width: int) -> dict[str, Any] | None:
    """One COCO annotation (without ids) of an object in an image of this size; None when the task leaves it out."""
    x, y, w, h = instance.bbox
    annotation: dict[str, Any] = {
        "category_id": instance.category_id,
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": int(instance.is_group_of),
    }
    if task == "bbox":
        return annotation
    if instance.segmentation is not None:
        return {
            **annotation,
            "segmentation": instance.segmentation.to_coco(),
            "area": float(rle.area(instance.segmentation)),
        }
    if not instance.is_group_of:
        return None
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {**annotation, "segmentation": coco_mask.frPyObjects([polygon], height, width)[0]}


def _scores(task: Task, images: Sequence[_Image], categories: Sequence[Category]) -> Scores:
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        for instance in image.instances:
            annotation = ground_truth(task, instance, image.height, image.width)
            if annotation is not None:
                truth.append({**annotation, "image_id": number})
        found.extend({**d, "image_id": number} for d in _detected(task, image.detections))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        evaluation = COCOeval(_coco(images, categories, truth), _coco(images, categories, found), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # Axes: IoU thresholds, recall thresholds, classes, sizes (the first: all), detections an image (the last: 100).
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    column = {category_id: k for k, category_id in enumerate(evaluation.params.catIds)}
    classes = tuple(
        ClassScores(c.id, c.name, _mean(precision[:, :, column[c.id]]), _mean(precision[0, :, column[c.id]]))
        for c in categories
    )
    numbers = {name: float(v) if v > -1 else None for name, v in zip(SUMMARY, evaluation.stats, strict=True)}
    return Scores(**numbers, classes=classes)


def _detected(task: Task, detections: Detections) -> list[dict[str, Any]]:
    """COCO's form of the detections of one image (without ids)."""
    rows: list[dict[str, Any]] = []
    for i in range(len(detections)):
        left, top, right, bottom = (float(value) for value in detections.boxes[i])
        row: dict[str, Any] = {
            "category_id": int(detections.labels[i]),
            "score": float(detections.scores[i]),
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": 0,
        }
        if task == "segm":
            row["segmentation"] = detections.masks[i].to_coco()
            row["area"] = float(rle.area(detections.masks[i]))
        rows.append(row)
    return rows


def _coco(images: Sequence[_Image], categories: Sequence[Category], annotations: list[dict[str, Any]]) -> COCO:
    """pycocotools' object; built by hand, because its `loadRes` fails on an empty list and rates masks by box area."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "width": image.width, "height": image.height} for i, image in enumerate(images, start=1)],
        "categories": [{"id": category.id, "name": category.name} for category in categories],
        "annotations": [{**annotation, "id": i} for i, annotation in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _mean(precision: Any) -> float | None:
    """The mean of precisions; COCO marks the undefined ones with -1."""
    defined = precision[precision > -1]
    return float(np.mean(defined)) if defined.size else None
