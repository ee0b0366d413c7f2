"""Objects of a sample that have a box and no mask of the source: which they are, and the sample with their masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shards.format.sample import Instance, MaskPrediction, Sample
from trainer.data.collate import decode_sample
from trainer.model.box_masks import BoxMask


class BoxedSample(NamedTuple):
    """A sample with objects that get masks.

    Attributes:
        sample: its annotations, and its image as it is stored.
        pixels: the image, uint8 [3, H, W] RGB.
        numbers: position of each of the N objects in the sample's `instances`.
        boxes: float32 [N, 4] left, top, right, bottom in pixels.
        labels: int64 [N] category ids.
    """

    sample: Sample
    pixels: Tensor
    numbers: tuple[int, ...]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class FillBatch:
    """Samples as they are read; a plain `Sample` has no object that gets a mask."""

    samples: list[Sample | BoxedSample]

    def pin_memory(self) -> FillBatch:
        """Copy the images into page-locked memory, from which they are copied to a GPU asynchronously."""
        return FillBatch(
            [one if isinstance(one, Sample) else one._replace(pixels=one.pixels.pin_memory()) for one in self.samples]
        )


class FillCollate:
    """Find the objects of some classes that get masks, and decode their images."""

    def __init__(self, classes: Set[int]) -> None:
        self.classes = classes

    def __call__(self, samples: Sequence[Sample], epoch: int) -> FillBatch:
        """Make a batch of samples; `epoch` is not used. A SampleError is raised for an image that is damaged."""
        return FillBatch([self._boxed(sample) for sample in samples])

    def _boxed(self, sample: Sample) -> Sample | BoxedSample:
        chosen = {i: one for i, one in enumerate(sample.instances) if gets_mask(one, self.classes)}
        if not chosen:
            return sample
        boxes = np.array([one.bbox for one in chosen.values()])
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([one.category_id for one in chosen.values()])
        return BoxedSample(sample, decode_sample(sample), tuple(chosen), boxes.astype(np.float32), labels)


def has_box_only(instance: Instance) -> bool:
    """Return whether an object's box could be filled: it has no mask of the source, and its box is an outline.

    A group-of box is a region of several objects, and one with `is_inside` is seen from the inside of its object.
    """
    return instance.source_mask is None and not instance.is_group_of and not instance.is_inside


def gets_mask(instance: Instance, classes: Set[int]) -> bool:
    """Return whether a mask is predicted for an object, perhaps in place of an earlier predicted one."""
    return has_box_only(instance) and instance.category_id in classes


def with_masks(boxed: BoxedSample, masks: Sequence[BoxMask], run: str, least: float) -> Sample:
    """Return a sample with the masks of its objects; empty ones and those with a score below `least` are left out."""
    instances = list(boxed.sample.instances)
    for number, (mask, score) in zip(boxed.numbers, masks, strict=True):
        prediction = None if mask is None or score < least else MaskPrediction(score, run)
        instances[number] = replace(
            instances[number], segmentation=None if prediction is None else mask, prediction=prediction
        )
    return replace(boxed.sample, instances=tuple(instances))


@dataclass(frozen=True)
class Tally:
    """What was predicted: objects with a box only, and of their masks the number per class id and the sum of scores."""

    boxes: int
    masks: Counter[int]
    score: float

    @property
    def mean(self) -> float:
        """The mean score of the masks, 0 without any."""
        return self.score / max(self.masks.total(), 1)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.boxes + other.boxes, self.masks + other.masks, self.score + other.score)


def tally(samples: Iterable[Sample], classes: Set[int]) -> Tally:
    """Count what samples have after masks of these classes were predicted."""
    objects = [one for sample in samples for one in sample.instances if has_box_only(one)]
    found = [one for one in objects if one.prediction is not None and one.category_id in classes]
    scores = [one.prediction.score for one in found if one.prediction is not None]
    return Tally(len(objects), Counter(one.category_id for one in found), sum(scores))
