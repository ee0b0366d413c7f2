"""COCO's average precision of boxes and masks, computed by pycocotools.

Boxes and masks are evaluated against different annotations, because many Open Images objects have a box and no mask:
  - boxes: every annotated box counts;
  - masks: objects without a mask are left out. COCO has no "unknown", so a detection of an object without a mask counts
    as an error here, unless it matches an object with a mask: read mask AP with that in mind.
Small, medium and large are by the area that the source's annotation states, as COCO does for boxes and masks; without
one by that of the mask, else of the box. A detection's is that of its box for boxes, of its mask for masks.
A group-of region is COCO's crowd: detections inside it are ignored. If it has no mask, its box is used.

pycocotools matches each image on the rank that processes it. Scores and bits are kept and gathered, no masks;
pycocotools accumulates them one class at a time.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from trainer.metrics.metric import PerImageMetric
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.inference import Detections

Task = Literal["bbox", "segm"]
TASKS: tuple[Task, ...] = ("bbox", "segm")
RECALLS = np.linspace(0.0, 1.0, 101)  # at which COCO samples the precision


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Average precision of one class, None where no object of the class is annotated, and how many are."""

    category_id: int
    name: str
    ap: float | None
    ap50: float | None
    objects: int


@dataclass(frozen=True, slots=True)
class Scores:
    """COCO's twelve numbers, 0 to 1, in COCO's order; None where nothing of that kind is annotated.

    Attributes:
        ap: average precision, the mean over IoU 0.50 to 0.95 and the classes; `ap50` and `ap75` are at one IoU.
        ap_small, ap_medium, ap_large: `ap` of objects below 32 x 32, up to 96 x 96, and above 96 x 96 pixels.
        ar1, ar10, ar100: average recall with that many detections per image; `ar_small` etc. with 100.
        classes: one entry per class, in the dataset's order.
        precision50: float64 [classes, 101] precision at IoU 0.5 over RECALLS; -1 where nothing is annotated.
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
    precision50: NDArray[np.float64] = field(compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the curves."""
        return {**{name: getattr(self, name) for name in SUMMARY}, "classes": [asdict(c) for c in self.classes]}


SUMMARY = tuple(item.name for item in fields(Scores) if item.name not in ("classes", "precision50"))


@dataclass(frozen=True, slots=True)
class CocoResult:
    """Box and mask scores; `boxes` and `masks` count the objects with each, without group-of regions."""

    bbox: Scores
    segm: Scores
    images: int
    detections: int
    boxes: int
    masks: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        counts = {name: getattr(self, name) for name in ("images", "detections", "boxes", "masks")}
        return {"bbox": self.bbox.to_json(), "segm": self.segm.to_json(), **counts}


@dataclass(frozen=True, slots=True)
class _Matches:
    """pycocotools' matches for one class in one image: its `evalImgs` of all sizes, as bits.

    Attributes:
        scores: float32 [D], descending.
        matched, ignored: bool [sizes, IoU thresholds, D], packed.
        gt_ignored: bool [sizes, G], packed: annotations that do not count.
        objects: G.
    """

    scores: NDArray[np.float32]
    matched: NDArray[np.uint8]
    ignored: NDArray[np.uint8]
    gt_ignored: NDArray[np.uint8]
    objects: int

    @classmethod
    def pack(cls, by_size: Sequence[dict[str, Any]]) -> Self:
        """Convert pycocotools' entries, one per size."""
        return cls(
            np.array(by_size[0]["dtScores"], np.float32),
            np.packbits([entry["dtMatches"] != 0 for entry in by_size]),
            np.packbits([entry["dtIgnore"] != 0 for entry in by_size]),
            np.packbits([np.asarray(entry["gtIgnore"]) != 0 for entry in by_size]),
            len(by_size[0]["gtIgnore"]),
        )

    def unpack(self, sizes: int, thresholds: int) -> list[dict[str, Any]]:
        """Return what `COCOeval.accumulate` reads, one entry per size."""
        shape = (sizes, thresholds, len(self.scores))
        matched, ignored = (_unpack_bits(packed, shape) for packed in (self.matched, self.ignored))
        gt_ignored = _unpack_bits(self.gt_ignored, (sizes, self.objects))
        return [
            {"dtScores": self.scores, "dtMatches": matched[i], "dtIgnore": ignored[i], "gtIgnore": gt_ignored[i]}
            for i in range(sizes)
        ]


@dataclass(frozen=True, slots=True)
class _Record:
    detections: int
    boxes: int
    masks: int
    matches: dict[Task, dict[int, _Matches]]  # by category id


class CocoMetric(PerImageMetric[_Record, CocoResult]):
    """COCO AP.

    Memory: about 10 KB per image with 100 detections of ten classes, on every rank after gathering; and about 2 KB per
    detection of the most frequent class while that is accumulated.
    """

    def _record(self, image: EvaluatedImage) -> _Record:
        sample, found = image.sample, image.detections
        objects = [instance for instance in sample.instances if not instance.is_group_of]
        masks = sum(instance.segmentation is not None for instance in objects)
        matches = {task: _match(task, sample, found) for task in TASKS}
        return _Record(len(found), len(objects), masks, matches)

    def _result(self, records: Sequence[_Record]) -> CocoResult:
        return CocoResult(
            bbox=_scores("bbox", records, self.categories),
            segm=_scores("segm", records, self.categories),
            images=len(records),
            detections=sum(record.detections for record in records),
            boxes=sum(record.boxes for record in records),
            masks=sum(record.masks for record in records),
        )


def ground_truth(task: Task, instance: Instance, height: int, width: int) -> dict[str, Any] | None:
    """Return the COCO annotation (without ids) of an object in an image of this size; None if the task ignores it."""
    x, y, w, h = instance.bbox
    mask = instance.segmentation
    annotation: dict[str, Any] = {
        "category_id": instance.category_id,
        "bbox": [x, y, w, h],
        "area": instance.coco_area(),
        "iscrowd": int(instance.is_group_of),
    }
    if task == "bbox":
        return annotation
    if mask is not None:
        return {**annotation, "segmentation": mask.to_coco()}
    if not instance.is_group_of:
        return None
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {**annotation, "segmentation": coco_mask.frPyObjects([polygon], height, width)[0]}


def _match(task: Task, sample: Sample, detections: Detections) -> dict[int, _Matches]:
    """Return pycocotools' matches in one image, by category id, with its own overlaps, of at most 100 detections."""
    annotations = (ground_truth(task, instance, sample.height, sample.width) for instance in sample.instances)
    truth = [annotation for annotation in annotations if annotation is not None]
    found = _coco_detections(task, detections)
    present = sorted({row["category_id"] for row in (*truth, *found)})
    evaluation = COCOeval(_coco_dataset(sample, truth), _coco_dataset(sample, found), task)
    evaluation.params.imgIds, evaluation.params.catIds = [1], present
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation.evaluate()
    sizes = len(evaluation.params.areaRng)
    rows = evaluation.evalImgs  # for each class, for each size
    return {category: _Matches.pack(rows[k * sizes : (k + 1) * sizes]) for k, category in enumerate(present)}


def _scores(task: Task, records: Sequence[_Record], categories: Sequence[Category]) -> Scores:
    tables: list[tuple[Any, Any, int]] = []
    with contextlib.redirect_stdout(io.StringIO()):
        for category in categories:
            of_images = [record.matches[task].get(category.id) for record in records]
            tables.append(_accumulate(task, category.id, [matches for matches in of_images if matches is not None]))
        evaluation = COCOeval(iouType=task)
        precision = np.concatenate([p for p, _, _ in tables], axis=2)
        evaluation.eval = {"precision": precision, "recall": np.concatenate([r for _, r, _ in tables], axis=1)}
        evaluation.summarize()
    # [IoU thresholds, recalls, classes, sizes (first: all), detections per image (last: 100)] -> [IoUs, recalls, C]
    precision = precision[:, :, :, 0, -1]
    classes = tuple(
        ClassScores(c.id, c.name, _mean(precision[:, :, k]), _mean(precision[0, :, k]), tables[k][2])
        for k, c in enumerate(categories)
    )
    numbers = {name: float(v) if v > -1 else None for name, v in zip(SUMMARY, evaluation.stats, strict=True)}
    return Scores(**numbers, classes=classes, precision50=precision[0].T.copy())


def _accumulate(task: Task, category: int, matches: Sequence[_Matches]) -> tuple[Any, Any, int]:
    """Return pycocotools' tables of precision and recall of one class, and its number of objects."""
    evaluation = COCOeval(iouType=task)
    params = evaluation.params
    sizes, thresholds = len(params.areaRng), len(params.iouThrs)
    rows = [each.unpack(sizes, thresholds) for each in matches]
    params.imgIds, params.catIds = list(range(len(rows))), [category]
    evaluation._paramsEval = params  # as `COCOeval.evaluate` would set it
    evaluation.evalImgs = [row[size] for size in range(sizes) for row in rows]
    evaluation.accumulate()
    objects = sum(int((~row[0]["gtIgnore"]).sum()) for row in rows)
    return evaluation.eval["precision"], evaluation.eval["recall"], objects


def _unpack_bits(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.unpackbits(packed, count=int(np.prod(shape))).view(np.bool_).reshape(shape)


def _coco_detections(task: Task, detections: Detections) -> list[dict[str, Any]]:
    """Return the detections of one image in COCO's form, without ids."""
    rows: list[dict[str, Any]] = []
    columns = (detections.boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), detections.masks)
    for (left, top, right, bottom), label, score, mask in zip(*columns, strict=True):
        area = (right - left) * (bottom - top) if task == "bbox" else float(rle.area(mask))  # as `COCO.loadRes`
        instance = Instance(label, (left, top, right - left, bottom - top), mask, area=area)
        rows.append({**(ground_truth(task, instance, mask.height, mask.width) or {}), "score": score})
    return rows


def _coco_dataset(sample: Sample, annotations: Sequence[dict[str, Any]]) -> COCO:
    """Return pycocotools' dataset of one image.

    Its `loadRes` is not used: it fails on an empty list, and takes the area of a mask's box for that of the mask.
    """
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1, "width": sample.width, "height": sample.height}],
        "categories": [{"id": number} for number in {annotation["category_id"] for annotation in annotations}],
        "annotations": [{**annotation, "id": i, "image_id": 1} for i, annotation in enumerate(annotations, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _mean(precision: Any) -> float | None:
    """Return the mean of the defined precisions; COCO marks undefined ones with -1."""
    defined = precision[precision > -1]
    return float(np.mean(defined)) if defined.size else None
