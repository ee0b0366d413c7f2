"""The instance segmentation metric of the Open Images Challenge 2019: mean AP at mask IoU 0.5.

Rules: https://storage.googleapis.com/openimages/web/evaluation.html. The steps and their order are those of the
official evaluator (`per_image_evaluation.py` of the TensorFlow Object Detection API). In each image:

  1. Classes. An object, a verified label and a detection count for their class and its ancestors, as far as these are
     among the dataset's classes. A class is evaluated in an image where it is verified, present or absent, or has an
     annotation; detections of other classes are ignored. An image without any verified label has only the latter.
  2. Masks. Each detection, by descending score, is compared with the object of its class that it overlaps most. At IoU
     0.5 or more it is right, unless a detection with a higher score was matched with that object.
  3. Boxes. Most objects of Open Images have a box and no mask. One detection for each, by box IoU 0.5 or more, is
     ignored: neither right nor wrong. A second one is wrong.
  4. Groups. A detection with at least half of its area inside a group-of region of its class is ignored. Regions with a
     mask come before step 3, those with only a box after it.
  5. The remaining detections are wrong; those of a class that is not annotated exhaustively in the image, which Open
     Images does not have, are ignored, as in LVIS. Recall is over the objects that have a mask.

AP is the area under the precision envelope, as in PASCAL VOC since 2010; the mean is over the classes that have an
object with a mask. A detection without a pixel is ignored. Detections of equal score count in the order of the ids of
their images, so that the numbers do not depend on the number of ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.format.dataset import Category
from shards.format.sample import Sample
from trainer.metrics.metric import PerImageMetric
from trainer.metrics.overlaps import EvaluatedImage

IOU = 0.5
# The outcomes of a detection; only the first two count for the precision.
OUTCOMES = ("right", "wrong", "unmasked", "group", "unverified")
RIGHT, WRONG, UNMASKED, GROUP, UNVERIFIED = range(len(OUTCOMES))

Parents = Mapping[int, Sequence[int]]  # category id -> ids of all its ancestors among the dataset's categories


@dataclass(frozen=True, slots=True)
class Matches:
    """Outcomes of the detections in one image: a row per detection and class that it counts for, by descending score.

    Attributes:
        detections: int64 [K] index of the detection.
        labels: int32 [K] category id that it counts for.
        scores: float32 [K].
        outcomes: uint8 [K] position in OUTCOMES.
        annotations: int64 [K] index of the annotation that a right detection found; -1 for the others.
        objects: int32 [G] category id of each object that has a mask, once per class that it counts for.
        is_verified: whether the image has verified labels.
    """

    detections: NDArray[np.int64]
    labels: NDArray[np.int32]
    scores: NDArray[np.float32]
    outcomes: NDArray[np.uint8]
    annotations: NDArray[np.int64]
    objects: NDArray[np.int32]
    is_verified: bool = True


@dataclass(frozen=True, slots=True)
class ClassResult:
    """Result of one class.

    Attributes:
        ap: None where no object of the class has a mask.
        objects: those with a mask, including those of descendants.
        outcomes: number of detections by outcome, a name of OUTCOMES.
        recall, precision: float64, after each counted detection by descending score; without the envelope.
    """

    category_id: int
    name: str
    ap: float | None
    objects: int
    outcomes: dict[str, int]
    recall: NDArray[np.float64] = field(compare=False, repr=False)
    precision: NDArray[np.float64] = field(compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the curves."""
        return {name: getattr(self, name) for name in ("category_id", "name", "ap", "objects", "outcomes")}


@dataclass(frozen=True, slots=True)
class OpenImagesResult:
    """Mean AP, 0 to 1, None where no object has a mask; and each class in the dataset's order.

    `unverified_images` have no verified label; with `has_hierarchy`, a detection counts for several classes.
    """

    ap: float | None
    images: int
    classes: tuple[ClassResult, ...]
    unverified_images: int = 0
    has_hierarchy: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the curves."""
        numbers = {"ap": self.ap, "images": self.images, "unverified_images": self.unverified_images}
        return {**numbers, "classes": [one.to_json() for one in self.classes]}

    def count(self, outcome: int) -> int:
        """Return the number of detections with this outcome, each once for every class that it counts for."""
        return sum(one.outcomes[OUTCOMES[outcome]] for one in self.classes)


class OpenImagesMetric(PerImageMetric[Matches, OpenImagesResult]):
    """AP of the Open Images Challenge.

    Memory: nine bytes per detection and half a kilobyte per image on every rank after gathering, and three times as
    much on the main one while it sorts: about 20 MB for 5,000 images of 100 detections.

    `parents` is from `read_parents`. It is needed where the dataset has a class and its child: without it, an object of
    the child is not one of the class. (Where the dataset has a class without its children, their objects and verified
    labels were put under the class when the dataset was built.)
    """

    def __init__(self, categories: Sequence[Category], parents: Parents | None = None) -> None:
        super().__init__(categories)
        self.parents = dict(parents or {})

    def _record(self, image: EvaluatedImage) -> Matches:
        none = np.empty(0, np.int64)
        return replace(match(image, self.parents), detections=none, annotations=none)

    def _result(self, records: Sequence[Matches]) -> OpenImagesResult:
        # An empty array first, because there may be no records.
        labels = np.concatenate([np.empty(0, np.int32), *(record.labels for record in records)])
        scores = np.concatenate([np.empty(0, np.float32), *(record.scores for record in records)])
        outcomes = np.concatenate([np.empty(0, np.uint8), *(record.outcomes for record in records)])
        objects = np.concatenate([np.empty(0, np.int32), *(record.objects for record in records)])
        order = np.argsort(-scores, kind="stable")
        labels, outcomes = labels[order], outcomes[order]
        classes = tuple(
            _class_result(category, outcomes[labels == category.id], int((objects == category.id).sum()))
            for category in self.categories
        )
        defined = [one.ap for one in classes if one.ap is not None]
        unverified, ap = sum(not record.is_verified for record in records), float(np.mean(defined)) if defined else None
        return OpenImagesResult(ap, len(records), classes, unverified, bool(self.parents))


def match(image: EvaluatedImage, parents: Parents) -> Matches:
    """Return the outcome of each detection of one image, by the rules in the docstring of this module."""
    found, overlaps = image.detections, image.overlaps
    rows, labels = _with_ancestors(found.labels, parents)
    columns, truth = _with_ancestors(overlaps.labels, parents)
    order = np.argsort(-found.scores[rows], kind="stable")
    order = order[~overlaps.empty[rows[order]]]
    rows, labels = rows[order], labels[order]
    masked, groups = overlaps.masked[columns], overlaps.groups[columns]
    # Annotations of other classes do not match. [K, annotations]
    values = np.where(labels[:, None] == truth[None, :], overlaps.values[np.ix_(rows, columns)], -1.0)

    outcomes = np.full(len(rows), WRONG, dtype=np.uint8)
    outcomes[~np.isin(labels, [*verified_classes(image.sample, parents), *truth])] = UNVERIFIED
    right, found_objects = _match_rows(values[:, masked & ~groups], outcomes == WRONG)
    outcomes[right] = RIGHT
    annotations = np.full(len(rows), -1, dtype=np.int64)
    annotations[right] = columns[masked & ~groups][found_objects]
    outcomes[_in_region(values[:, masked & groups]) & (outcomes == WRONG)] = GROUP
    outcomes[_match_rows(values[:, ~masked & ~groups], outcomes == WRONG)[0]] = UNMASKED
    outcomes[_in_region(values[:, ~masked & groups]) & (outcomes == WRONG)] = GROUP
    partly = {own for label in image.sample.not_exhaustive for own in (label, *parents.get(label, ()))}
    outcomes[np.isin(labels, list(partly)) & (outcomes == WRONG)] = UNVERIFIED
    objects = truth[masked & ~groups].astype(np.int32)
    is_verified = bool(image.sample.verified_present or image.sample.verified_absent)
    return Matches(rows, labels.astype(np.int32), found.scores[rows], outcomes, annotations, objects, is_verified)


def verified_classes(sample: Sample, parents: Parents) -> set[int]:
    """Return the present classes with their ancestors, and the absent ones with their descendants."""
    present = {own for label in sample.verified_present for own in (label, *parents.get(label, ()))}
    absent = set(sample.verified_absent)
    return present | absent | {child for child, ancestors in parents.items() if absent.intersection(ancestors)}


def _class_result(category: Category, outcomes: NDArray[np.uint8], objects: int) -> ClassResult:
    """Return the result of one class from the outcomes of its detections, by descending score."""
    right = outcomes[(outcomes == RIGHT) | (outcomes == WRONG)] == RIGHT
    hits = np.cumsum(right, dtype=np.float64)
    precision, recall = hits / np.arange(1, len(right) + 1), hits / max(objects, 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    ap = float(np.sum(np.diff(recall, prepend=0.0) * envelope)) if objects else None
    counts = dict(zip(OUTCOMES, np.bincount(outcomes, minlength=len(OUTCOMES)).tolist(), strict=True))
    return ClassResult(category.id, category.name, ap, objects, counts, recall, precision)


def _with_ancestors(labels: NDArray[np.int64], parents: Parents) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Repeat each entry for its class and each ancestor: return its position and the class."""
    if not parents:
        return np.arange(len(labels)), labels
    pairs = [(i, label) for i, own in enumerate(labels.tolist()) for label in (own, *parents.get(own, ()))]
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _match_rows(
    values: NDArray[np.float64], candidates: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first candidate row of each column whose largest value is in that column and at least IOU.

    After the rows come their columns.
    """
    if not values.shape[1]:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    best = values.argmax(axis=1)
    reach = np.flatnonzero(candidates & (values[np.arange(len(values)), best] >= IOU))
    matched, first = np.unique(best[reach], return_index=True)
    return reach[first], matched


def _in_region(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray((values >= IOU).any(axis=1))
