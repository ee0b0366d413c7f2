"""The instance segmentation metric of the Open Images Challenge 2019: mean AP at mask IoU 0.5.

Rules: https://storage.googleapis.com/openimages/web/evaluation.html. The steps and their order are those of the
official evaluator (`per_image_evaluation.py` of the TensorFlow Object Detection API). In each image:

  1. Classes. An object, a verified label and a detection count for their class and its ancestors, as far as these are
     evaluated too. A class is evaluated in an image where it is verified, present or absent, or has an annotation;
     detections of other classes are left out.
  2. Masks. Each detection, the best score first, is held against the object of its class that it overlaps most. At IoU
     0.5 or more it is right, unless a better one has taken that object.
  3. Boxes. Most objects of Open Images have a box and no mask. One detection for each, by box IoU 0.5 or more, is left
     out: neither right nor wrong. A second one is wrong.
  4. Groups. A detection that lies in a group-of region of its class with half of its own area or more is left out.
     Regions with a mask come before step 3, those with only a box after it.
  5. What is left is wrong. The recall is of the objects that have a mask.

AP is the area under the precision envelope, as PASCAL VOC has it since 2010; the mean is over the classes that have an
object with a mask. A detection without a pixel is none. Detections of equal score count in the order of their images'
ids, so that the numbers are the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.format.dataset import Category
from shards.format.sample import Sample
from trainer.metrics import Gather, alone, images_of_all_ranks
from trainer.metrics.overlaps import Overlaps, compute_overlaps

if TYPE_CHECKING:
    from trainer.model.inference import Detections

IOU = 0.5
# What becomes of a detection; all but the first two are left out of the precision.
OUTCOMES = ("right", "wrong", "unmasked", "group", "unverified")
RIGHT, WRONG, UNMASKED, GROUP, UNVERIFIED = range(len(OUTCOMES))

Parents = Mapping[int, Sequence[int]]  # category id -> ids of all its ancestors among the dataset's categories


@dataclass(frozen=True, slots=True)
class Matches:
    """What became of the detections of one image; one row for each class that a detection counts for, best score first.

    Attributes:
        detections: int64 (K,), which detection it is.
        labels: int64 (K,), the category it counts for.
        scores: float32 (K,).
        outcomes: uint8 (K,), of OUTCOMES.
        objects: int64 (G,), the category of each object that has a mask, once for each class that it counts for.
    """

    detections: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    outcomes: NDArray[np.uint8]
    objects: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class.

    Attributes:
        ap: None where no object of the class has a mask.
        objects: those with a mask, the class's children among them.
        outcomes: how many detections became what, by the names of OUTCOMES.
        recall, precision: float64, a point a counted detection, the best score first; without the envelope.
    """

    category_id: int
    name: str
    ap: float | None
    objects: int
    outcomes: dict[str, int]
    recall: NDArray[np.float64] = field(compare=False, repr=False)
    precision: NDArray[np.float64] = field(compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the curves."""
        return {name: getattr(self, name) for name in ("category_id", "name", "ap", "objects", "outcomes")}


@dataclass(frozen=True, slots=True)
class OpenImagesResult:
    """The mean AP, 0 to 1, None where no object has a mask; and each class in the dataset's order."""

    ap: float | None
    images: int
    classes: tuple[ClassResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the curves."""
        return {"ap": self.ap, "images": self.images, "classes": [one.to_json() for one in self.classes]}

    def count(self, outcome: int) -> int:
        """Detections of all classes that became this."""
        return sum(one.outcomes[OUTCOMES[outcome]] for one in self.classes)


@dataclass(frozen=True, slots=True)
class _Image:
    """One image as it travels between ranks; see `Matches`."""

    image_id: str
    labels: NDArray[np.int32]
    scores: NDArray[np.float32]
    outcomes: NDArray[np.uint8]
    objects: NDArray[np.int32]


class OpenImagesMetric:
    """The challenge's AP over the images that every rank processes; each image must be processed once, on one rank.

    Memory: nine bytes a detection and half a kilobyte an image, held by every rank after gathering, and three times as
    much on the main one while it sorts: some 20 MB for 5,000 images of 100. Masks are let go as images come in.

    Args:
        categories: the classes.
        parents: see `Parents`; of `read_parents`. Without it, a class's objects are those that the dataset gives it.
            (A dataset whose builder took a class with its children has the children's objects under that class, and its
            verified labels say so: nothing is missing. Only where a class and its child are both in the dataset, the
            child's objects are not the parent's.)
    """

    def __init__(self, categories: Sequence[Category], parents: Parents | None = None) -> None:
        self.categories = tuple(categories)
        self.parents = dict(parents or {})
        self._images: list[_Image] = []

    def reset(self) -> None:
        """Forget every image."""
        self._images = []

    def process(self, samples: Sequence[Sample], detections: Sequence[Detections]) -> None:
        """Take in images and what was found in them, in pixels of the image as stored."""
        for sample, found in zip(samples, detections, strict=True):
            matches = match(sample, found, compute_overlaps(sample.instances, found), self.parents)
            self._images.append(
                _Image(
                    sample.image_id,
                    matches.labels.astype(np.int32),
                    matches.scores,
                    matches.outcomes,
                    matches.objects.astype(np.int32),
                )
            )

    def evaluate(self, gather: Gather = alone) -> OpenImagesResult | None:
        """The result over all ranks' images; None on ranks that `gather` gives nothing.

        Raises:
            RuntimeError: an image was processed twice.
        """
        images = images_of_all_ranks(self._images, gather)
        if images is None:
            return None
        labels = _joined([image.labels for image in images], np.int32)
        scores = _joined([image.scores for image in images], np.float32)
        outcomes = _joined([image.outcomes for image in images], np.uint8)
        objects = _joined([image.objects for image in images], np.int32)
        order = np.argsort(-scores, kind="stable")
        labels, outcomes = labels[order], outcomes[order]
        classes = tuple(
            _rate(category, outcomes[labels == category.id], int((objects == category.id).sum()))
            for category in self.categories
        )
        defined = [one.ap for one in classes if one.ap is not None]
        return OpenImagesResult(float(np.mean(defined)) if defined else None, len(images), classes)


def match(sample: Sample, found: Detections, overlaps: Overlaps, parents: Parents) -> Matches:
    """What becomes of each detection of one image; see the module's text for the rules.

    Args:
        overlaps: of the sample's instances and `found`.
        parents: see `Parents`.
    """
    rows, labels = _expanded(found.labels, parents)
    columns, truth = _expanded(overlaps.labels, parents)
    order = np.argsort(-found.scores[rows], kind="stable")
    order = order[~overlaps.empty[rows[order]]]
    rows, labels = rows[order], labels[order]
    masked, groups = overlaps.masked[columns], overlaps.groups[columns]
    # Held against annotations of its own class only.
    values = np.where(labels[:, None] == truth[None, :], overlaps.values[np.ix_(rows, columns)], -1.0)

    outcomes = np.full(len(rows), WRONG, dtype=np.uint8)
    outcomes[~np.isin(labels, [*verified_classes(sample, parents), *truth])] = UNVERIFIED
    outcomes[_first_of_each(values[:, masked & ~groups], outcomes == WRONG)] = RIGHT
    outcomes[_inside(values[:, masked & groups]) & (outcomes == WRONG)] = GROUP
    outcomes[_first_of_each(values[:, ~masked & ~groups], outcomes == WRONG)] = UNMASKED
    outcomes[_inside(values[:, ~masked & groups]) & (outcomes == WRONG)] = GROUP
    return Matches(rows, labels, found.scores[rows], outcomes, truth[masked & ~groups])


def verified_classes(sample: Sample, parents: Parents) -> set[int]:
    """Present classes with their ancestors, absent ones with their descendants."""
    present = {own for label in sample.verified_present for own in (label, *parents.get(label, ()))}
    absent = set(sample.verified_absent)
    return present | absent | {child for child, above in parents.items() if absent.intersection(above)}


def precision_recall(right: NDArray[np.bool_], objects: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall after each detection, float64 (K,) each.

    Args:
        right: (K,) whether each counted detection is, the best score first.
        objects: how many there are to find, at least 1.
    """
    hits = np.cumsum(right, dtype=np.float64)
    return hits / np.arange(1, len(right) + 1), hits / objects


def average_precision(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> float:
    """The area under the precision envelope (PASCAL VOC 2010 and later); both as from `precision_recall`."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _rate(category: Category, outcomes: NDArray[np.uint8], objects: int) -> ClassResult:
    """One class from the outcomes of its detections, the best score first."""
    right = outcomes[(outcomes == RIGHT) | (outcomes == WRONG)] == RIGHT
    precision, recall = precision_recall(right, max(objects, 1))
    counts = np.bincount(outcomes, minlength=len(OUTCOMES)).tolist()
    return ClassResult(
        category.id,
        category.name,
        average_precision(precision, recall) if objects else None,
        objects,
        dict(zip(OUTCOMES, counts, strict=True)),
        recall,
        precision,
    )


def _expanded(labels: NDArray[np.int64], parents: Parents) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each entry once for its class and once for each ancestor: its position, and the class."""
    if not parents:
        return np.arange(len(labels)), labels
    pairs = [(i, label) for i, own in enumerate(labels.tolist()) for label in (own, *parents.get(own, ()))]
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _first_of_each(values: NDArray[np.float64], candidates: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rows that match: among the candidates, the first for each column, held against their largest value only."""
    if not values.shape[1]:
        return np.empty(0, dtype=np.int64)
    best = values.argmax(axis=1)
    reach = np.flatnonzero(candidates & (values[np.arange(len(values)), best] >= IOU))
    _, first = np.unique(best[reach], return_index=True)
    return reach[first]


def _inside(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows lie in a region."""
    return np.asarray((values >= IOU).any(axis=1))


def _joined(arrays: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *arrays])
