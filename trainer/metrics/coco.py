"""COCO's average precision of boxes and masks, computed by pycocotools.

Two sets of annotations are rated, because an Open Images object often has a box and no mask:
  - boxes: every annotated box counts; sizes (small, medium, large) go by the box's area;
  - masks: objects without a mask are left out. Sizes go by the mask's area. COCO's rules know no "unknown", so a
    correct detection of an object without a mask counts as an error here: read mask AP with that in mind.
A group-of region is COCO's crowd: detections in it are neither right nor wrong. Without a mask its rectangle serves.

pycocotools compares an image when it comes in, on the rank that has it. What is kept and gathered are scores and bits,
no masks; pycocotools accumulates them one class at a time.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from trainer.metrics import Gather, alone, images_of_all_ranks

if TYPE_CHECKING:
    from trainer.model.inference import Detections

Task = Literal["bbox", "segm"]
TASKS: tuple[Task, ...] = ("bbox", "segm")
RECALLS = np.linspace(0.0, 1.0, 101)  # at which COCO reads the precision


@dataclass(frozen=True, slots=True)
class ClassScores:
    """One class's average precision, None where no object of the class is annotated; and how many are."""

    category_id: int
    name: str
    ap: float | None
    ap50: float | None
    objects: int


@dataclass(frozen=True, slots=True)
class Scores:
    """COCO's twelve numbers, 0 to 1, in COCO's order; None where nothing of that kind is annotated.

    Attributes:
        ap: average precision, averaged over IoU 0.50 to 0.95 and the classes; `ap50`, `ap75` at one IoU.
        ap_small, ap_medium, ap_large: `ap` of objects below 32 x 32, up to 96 x 96, and above 96 x 96 pixels.
        ar1, ar10, ar100: average recall with that many detections an image; `ar_small` ... as above, with 100.
        classes: one entry a class, in the dataset's order.
        precision50: float64 (classes, 101), precision at IoU 0.5 over RECALLS; -1 where nothing is annotated.
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
        """Plain values, without the curves."""
        return {**{name: getattr(self, name) for name in SUMMARY}, "classes": [asdict(c) for c in self.classes]}


SUMMARY = tuple(item.name for item in fields(Scores) if item.name not in ("classes", "precision50"))


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
        counts = {name: getattr(self, name) for name in ("images", "detections", "boxes", "masks")}
        return {"bbox": self.bbox.to_json(), "segm": self.segm.to_json(), **counts}


@dataclass(frozen=True, slots=True)
class _Entry:
    """What pycocotools found for one class in one image: its `evalImgs` over all sizes, as bits.

    Attributes:
        scores: float32 (D,), the best first.
        matched, ignored: bool (sizes, IoU thresholds, D), packed.
        left_out: bool (sizes, G), packed: annotations that do not count.
    """

    scores: NDArray[np.float32]
    matched: NDArray[np.uint8]
    ignored: NDArray[np.uint8]
    left_out: NDArray[np.uint8]
    objects: int

    @classmethod
    def pack(cls, of_sizes: Sequence[dict[str, Any]]) -> _Entry:
        """From pycocotools' entries, one a size."""
        return cls(
            np.array(of_sizes[0]["dtScores"], np.float32),
            np.packbits([entry["dtMatches"] != 0 for entry in of_sizes]),
            np.packbits([entry["dtIgnore"] != 0 for entry in of_sizes]),
            np.packbits([np.asarray(entry["gtIgnore"]) != 0 for entry in of_sizes]),
            len(of_sizes[0]["gtIgnore"]),
        )

    def unpack(self, sizes: int, thresholds: int) -> list[dict[str, Any]]:
        """What `accumulate` reads of pycocotools' entries, one a size."""
        shape = (sizes, thresholds, len(self.scores))
        matched, ignored = (_bits(packed, shape) for packed in (self.matched, self.ignored))
        left_out = _bits(self.left_out, (sizes, self.objects))
        return [
            {"dtScores": self.scores, "dtMatches": matched[i], "dtIgnore": ignored[i], "gtIgnore": left_out[i]}
            for i in range(sizes)
        ]


@dataclass(frozen=True, slots=True)
class _Image:
    """One image as it travels between ranks: no masks, no pixels."""

    image_id: str
    detections: int
    boxes: int
    masks: int
    entries: dict[Task, dict[int, _Entry]]


class CocoMetric:
    """COCO AP over the images that every rank processes; each image must be processed once, on one rank.

    Memory: some 10 KB an image with 100 detections of ten classes, held by every rank after gathering; and about 2 KB a
    detection of the class with the most of them while that is accumulated. Masks are let go as images come in.
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
            objects = [instance for instance in sample.instances if not instance.is_group_of]
            masks = sum(instance.segmentation is not None for instance in objects)
            entries = {task: _compare(task, sample, found) for task in TASKS}
            self._images.append(_Image(sample.image_id, len(found), len(objects), masks, entries))

    def evaluate(self, gather: Gather = alone) -> CocoResult | None:
        """The scores over all ranks' images; None on ranks that `gather` gives nothing.

        Raises:
            RuntimeError: an image was processed twice.
        """
        images = images_of_all_ranks(self._images, gather)
        if images is None:
            return None
        return CocoResult(
            bbox=_scores("bbox", images, self.categories),
            segm=_scores("segm", images, self.categories),
            images=len(images),
            detections=sum(image.detections for image in images),
            boxes=sum(image.boxes for image in images),
            masks=sum(image.masks for image in images),
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


def _compare(task: Task, sample: Sample, detections: Detections) -> dict[int, _Entry]:
    """What pycocotools finds in one image, by category id; classes without objects and detections are left out."""
    annotations = (ground_truth(task, instance, sample.height, sample.width) for instance in sample.instances)
    truth = [annotation for annotation in annotations if annotation is not None]
    found = _detected(task, detections)
    present = sorted({row["category_id"] for row in (*truth, *found)})
    evaluation = COCOeval(_coco(sample, truth), _coco(sample, found), task)
    evaluation.params.imgIds, evaluation.params.catIds = [1], present
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        evaluation.evaluate()
    sizes = len(evaluation.params.areaRng)
    rows = evaluation.evalImgs  # class after class, size after size
    return {category: _Entry.pack(rows[k * sizes : (k + 1) * sizes]) for k, category in enumerate(present)}


def _scores(task: Task, images: Sequence[_Image], categories: Sequence[Category]) -> Scores:
    tables: list[tuple[Any, Any, int]] = []
    with contextlib.redirect_stdout(io.StringIO()):
        for category in categories:
            of_images = [image.entries[task].get(category.id) for image in images]
            tables.append(_accumulate(task, category.id, [entry for entry in of_images if entry is not None]))
        evaluation = COCOeval(iouType=task)
        precision = np.concatenate([p for p, _, _ in tables], axis=2)
        evaluation.eval = {"precision": precision, "recall": np.concatenate([r for _, r, _ in tables], axis=1)}
        evaluation.summarize()
    # Axes: IoU thresholds, recall thresholds, classes, sizes (the first: all), detections an image (the last: 100).
    precision = precision[:, :, :, 0, -1]
    classes = tuple(
        ClassScores(c.id, c.name, _mean(precision[:, :, k]), _mean(precision[0, :, k]), tables[k][2])
        for k, c in enumerate(categories)
    )
    numbers = {name: float(v) if v > -1 else None for name, v in zip(SUMMARY, evaluation.stats, strict=True)}
    return Scores(**numbers, classes=classes, precision50=precision[0].T.copy())


def _accumulate(task: Task, category: int, entries: Iterable[_Entry]) -> tuple[Any, Any, int]:
    """pycocotools' tables of precision and recall of one class, and its objects; images in the order of their ids."""
    evaluation = COCOeval(iouType=task)
    params = evaluation.params
    sizes, thresholds = len(params.areaRng), len(params.iouThrs)
    rows = [entry.unpack(sizes, thresholds) for entry in entries]
    params.imgIds, params.catIds = list(range(len(rows))), [category]
    evaluation._paramsEval = params  # what `evaluate` would have left there
    evaluation.evalImgs = [row[size] for size in range(sizes) for row in rows]
    evaluation.accumulate()
    objects = sum(int((~row[0]["gtIgnore"]).sum()) for row in rows)
    return evaluation.eval["precision"], evaluation.eval["recall"], objects


def _bits(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.unpackbits(packed, count=int(np.prod(shape))).view(np.bool_).reshape(shape)


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


def _coco(sample: Sample, annotations: Sequence[dict[str, Any]]) -> COCO:
    """pycocotools' object of one image; by hand, because its `loadRes` fails on an empty list and rates masks by box
    area."""
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
    """The mean of precisions; COCO marks the undefined ones with -1."""
    defined = precision[precision > -1]
    return float(np.mean(defined)) if defined.size else None
