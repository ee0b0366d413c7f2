"""Confusion matrix: how often objects of each class were detected as which class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.format.dataset import Category
from trainer.metrics.metric import Gather, single_process
from trainer.metrics.openimages import IOU, verified_classes
from trainer.metrics.overlaps import EvaluatedImage, match_greedily


@dataclass(frozen=True)
class Confusion:
    """Counts of annotated against detected classes, for detections with a score of at least `score`.

    Attributes:
        names: of the C classes.
        counts: int64 [C + 1, C + 1]. Row: the annotated class, the last one for nothing annotated. Column: the detected
            class, the last one for nothing found.
    """

    names: tuple[str, ...]
    counts: NDArray[np.int64]
    score: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"score": self.score, "names": list(self.names), "counts": self.counts.tolist()}


class ConfusionMetric:
    """Matches detections and objects one to one at IoU 0.5, of masks, or of boxes where an object has no mask.

    Detections are matched in the order of their scores, first with objects of their own class, the remaining ones with
    those of other classes. An unmatched detection is a false positive, unless it is in a group-of region of its class,
    or its class is not verified, or not annotated exhaustively, in the image: these are not counted. Detections below
    `score` are ignored. Classes are those of the annotations, without a hierarchy: a man that is detected as a person
    is a confusion.
    """

    def __init__(self, categories: Sequence[Category], score: float) -> None:
        self.categories, self.score = tuple(categories), score
        self._position = {category.id: i for i, category in enumerate(self.categories)}
        self._counts = np.zeros((len(self.categories) + 1,) * 2, dtype=np.int64)

    def process(self, images: Sequence[EvaluatedImage]) -> None:
        """Add images with their detections."""
        for image in images:
            for annotated, label in matched_classes(image, self.score):
                self._counts[self._position.get(annotated, -1), self._position.get(label, -1)] += 1

    def evaluate(self, gather: Gather = single_process) -> Confusion | None:
        """Return the counts over the images of all ranks; None on ranks for which `gather` returns None."""
        gathered = gather([self._counts])
        if gathered is None:
            return None
        counts: NDArray[np.int64] = np.sum(gathered, axis=0)
        return Confusion(tuple(category.name for category in self.categories), counts, self.score)


def matched_classes(image: EvaluatedImage, score: float) -> list[tuple[int, int]]:
    """Return the category ids (annotated, found) of each match of one image, 0 for nothing; see `ConfusionMetric`."""
    found, overlaps = image.detections, image.overlaps
    counted = np.flatnonzero((found.scores >= score) & ~overlaps.empty)
    counted = counted[np.argsort(-found.scores[counted], kind="stable")]
    labels, objects = found.labels[counted], np.flatnonzero(~overlaps.groups)
    values = overlaps.values[np.ix_(counted, objects)]
    same = labels[:, None] == overlaps.labels[objects][None, :]  # [detections, objects]
    matched = match_greedily(np.where(same, values, 0.0), IOU)
    left = np.flatnonzero(matched < 0)
    free = np.setdiff1d(np.arange(len(objects)), matched)
    others = match_greedily(values[np.ix_(left, free)], IOU)
    matched[left[others >= 0]] = free[others[others >= 0]]

    verified = verified_classes(image.sample, {}) | set(overlaps.labels.tolist())
    verified -= set(image.sample.not_exhaustive)
    regions = overlaps.groups[None, :] & (labels[:, None] == overlaps.labels[None, :])
    in_group = (regions & (overlaps.values[counted] >= IOU)).any(axis=1)
    result = []
    for i, label in enumerate(labels.tolist()):
        if matched[i] >= 0:
            result.append((int(overlaps.labels[objects[matched[i]]]), label))
        elif label in verified and not in_group[i]:
            result.append((0, label))
    missed = np.setdiff1d(np.arange(len(objects)), matched)
    return result + [(label, 0) for label in overlaps.labels[objects[missed]].tolist()]
