"""What is taken for what: annotated objects against detections, counted over a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.format.dataset import Category
from shards.format.sample import Sample
from trainer.metrics import Gather, alone
from trainer.metrics.openimages import IOU, verified_classes
from trainer.metrics.overlaps import Overlaps, compute_overlaps, pair

if TYPE_CHECKING:
    from trainer.model.inference import Detections


@dataclass(frozen=True)
class Confusion:
    """
    Attributes:
        names: of the C classes.
        counts: int64 (C + 1, C + 1). Row: what is annotated, the last one nothing. Column: what was found there, the
            last one nothing.
        score: the lowest score that counted.
    """

    names: tuple[str, ...]
    counts: NDArray[np.int64]
    score: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"score": self.score, "names": list(self.names), "counts": self.counts.tolist()}


class ConfusionMetric:
    """Pairs detections and objects one to one at IoU 0.5, by masks, or boxes where an object has no mask.

    The best score chooses first, among the objects of its own class, and only then among those of others. A detection
    that is left is a false one, unless it lies in a group-of region of its class, or nobody verified its class in the
    image: such a one is not counted.

    Args:
        categories: the classes.
        score: detections below it are not counted.
    """

    def __init__(self, categories: Sequence[Category], score: float) -> None:
        self.categories, self.score = tuple(categories), score
        self._place = {category.id: i for i, category in enumerate(self.categories)}
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self._counts = np.zeros((len(self.categories) + 1,) * 2, dtype=np.int64)

    def process(self, samples: Sequence[Sample], detections: Sequence[Detections]) -> None:
        """Take in images and what was found in them, in pixels of the image as stored."""
        for sample, found in zip(samples, detections, strict=True):
            for annotated, label in pairs(sample, found, compute_overlaps(sample.instances, found), self.score):
                self._counts[self._place.get(annotated, -1), self._place.get(label, -1)] += 1

    def evaluate(self, gather: Gather = alone) -> Confusion | None:
        """The counts over all ranks' images; None on ranks that `gather` gives nothing."""
        gathered = gather([self._counts])
        if gathered is None:
            return None
        counts: NDArray[np.int64] = np.sum(gathered, axis=0)
        return Confusion(tuple(category.name for category in self.categories), counts, self.score)


def pairs(sample: Sample, found: Detections, overlaps: Overlaps, score: float) -> list[tuple[int, int]]:
    """The category ids (annotated, found) of each pair of one image; 0 for nothing. See `ConfusionMetric`."""
    sure = np.flatnonzero((found.scores >= score) & ~overlaps.empty)
    sure = sure[np.argsort(-found.scores[sure], kind="stable")]
    labels, objects = found.labels[sure], np.flatnonzero(~overlaps.groups)
    values = overlaps.values[np.ix_(sure, objects)]
    same = labels[:, None] == overlaps.labels[objects][None, :]
    paired = pair(np.where(same, values, 0.0), IOU)
    left = np.flatnonzero(paired < 0)
    free = np.setdiff1d(np.arange(len(objects)), paired)
    others = pair(values[np.ix_(left, free)], IOU)
    paired[left[others >= 0]] = free[others[others >= 0]]

    known = verified_classes(sample, {}) | set(overlaps.labels.tolist())
    regions = overlaps.groups[None, :] & (labels[:, None] == overlaps.labels[None, :])
    inside = (regions & (overlaps.values[sure] >= IOU)).any(axis=1)
    result = []
    for i, label in enumerate(labels.tolist()):
        if paired[i] >= 0:
            result.append((int(overlaps.labels[objects[paired[i]]]), label))
        elif label in known and not inside[i]:
            result.append((0, label))
    missed = np.setdiff1d(np.arange(len(objects)), paired)
    return result + [(label, 0) for label in overlaps.labels[objects[missed]].tolist()]
