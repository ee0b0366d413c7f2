"""What a dataset holds, in numbers: from its index, and of a few samples what the index does not tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.format.dataset import Dataset
from shards.format.sample import FLAGS, Sample
from shards.inspect.preview_samples import first_rows, read_annotations


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """One class in one split, or in all: images that have it, its boxes, those with a mask, those that are group-of."""

    id: int
    name: str
    images: int
    boxes: int
    masks: int
    groups: int

    @property
    def box_only(self) -> int:
        """Objects (group-of regions aside) that have a box and no mask."""
        return max(self.boxes - self.groups - self.masks, 0)

    @property
    def box_only_share(self) -> float | None:
        """Of its objects, 0 to 1; None where there are none."""
        objects = self.boxes - self.groups
        return self.box_only / objects if objects > 0 else None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Pixels of the images of a split: least, median and largest; and the share of those that stand upright."""

    width: tuple[int, int, int]
    height: tuple[int, int, int]
    portrait: float


@dataclass(frozen=True, slots=True)
class ClassLabels:
    """In how many images a class is verified to be present, and to be absent; in the others it is unknown."""

    present: int
    absent: int


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """What the annotations of some images of a split say, which the index does not.

    Attributes:
        images: how many were looked at.
        classes: by category id.
        objects: annotations of these images.
        flags: how many of them have each flag.
    """

    images: int
    classes: dict[int, ClassLabels]
    objects: int
    flags: dict[str, int]


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """One split: images, shards, bytes, sizes, classes by id, and verified labels where they were asked for."""

    split: str
    images: int
    shards: int
    nbytes: int
    sizes: Sizes | None
    classes: tuple[ClassCounts, ...]
    labels: LabelCounts | None = None


def count(dataset: Dataset, *, label_images: int = 0, seed: int = 0) -> tuple[SplitCounts, ...]:
    """Count every split of a dataset from its index.

    Args:
        dataset: the dataset.
        label_images: of so many images a split, chosen by a hash of the seed, the annotations are read for what the
            index does not tell: two small requests each. 0: none.
        seed: of the hash.

    Raises:
        SampleError: a sample cannot be read.
    """
    return tuple(_count_split(dataset, split, label_images, seed) for split in dataset.splits)


def totals(splits: Sequence[SplitCounts]) -> tuple[ClassCounts, ...]:
    """The classes over all splits."""
    columns = ("images", "boxes", "masks", "groups")
    return tuple(
        ClassCounts(rows[0].id, rows[0].name, *(sum(getattr(row, name) for row in rows) for name in columns))
        for rows in zip(*(split.classes for split in splits))
    )


def _count_split(dataset: Dataset, split: str, label_images: int, seed: int) -> SplitCounts:
    index = dataset.index(split)
    names = ("images", "instances", "masks", "groups")
    columns = [index.counts(name, dataset.categories) for name in names]
    shards = [shard for shard in dataset.info.shards if shard.split == split]
    labels = None
    if label_images and len(index):
        labels = _count_labels(read_annotations(dataset.root, index, first_rows(index, label_images, seed)))
    return SplitCounts(
        split=split,
        images=len(index),
        shards=len(shards),
        nbytes=sum(shard.nbytes for shard in shards),
        sizes=_sizes(index.width, index.height) if len(index) else None,
        classes=tuple(
            ClassCounts(category.id, category.name, *(column[category.id] for column in columns))
            for category in dataset.categories
        ),
        labels=labels,
    )


def _sizes(width: NDArray[np.int32], height: NDArray[np.int32]) -> Sizes:
    def spread(values: NDArray[np.int32]) -> tuple[int, int, int]:
        return int(values.min()), int(np.median(values)), int(values.max())

    return Sizes(spread(width), spread(height), float(np.mean(height > width)))


def _count_labels(samples: Sequence[Sample]) -> LabelCounts:
    present = Counter(number for sample in samples for number in sample.verified_present)
    absent = Counter(number for sample in samples for number in sample.verified_absent)
    instances = [instance for sample in samples for instance in sample.instances]
    return LabelCounts(
        images=len(samples),
        classes={number: ClassLabels(present[number], absent[number]) for number in sorted(present | absent)},
        objects=len(instances),
        flags={flag: sum(getattr(instance, flag) for instance in instances) for flag in FLAGS},
    )
