"""Counts of a dataset, from its index and, for what the index does not hold, from the annotations of a few samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.format.dataset import Dataset
from shards.format.sample import FLAGS, Sample
from shards.inspect.preview_samples import first_rows, read_annotations

if TYPE_CHECKING:
    import pandas as pd

FLAG_NAMES = {flag: flag.removeprefix("is_").replace("_", "-") for flag in FLAGS}
# And their index columns.
COUNTS = {"images": "images", "boxes": "instances", "masks": "masks", "predicted": "predicted", "groups": "groups"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Smallest, median and largest width and height in pixels, and the share of portrait images from 0 to 1."""

    width: tuple[int, int, int]
    height: tuple[int, int, int]
    portrait: float


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """Counts of the annotations of some images of a split."""

    images: int  # whose annotations were read
    classes: dict[int, dict[str, int]]  # by category id, the images in which it is verified as `present` and `absent`
    objects: int  # annotations of these images
    flags: dict[str, int]  # annotations that have each flag


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """Counts of one split."""

    split: str
    images: int
    shards: int
    nbytes: int  # of all shards
    sizes: Sizes | None  # None if there are no images
    classes: pd.DataFrame  # per class, ids ascending: `id`, `name`, numbers (`COUNTS`)
    labels: LabelCounts | None  # None if no annotations were read

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with a list of objects for `classes`."""
        return {**asdict(self), "classes": self.classes.to_dict("records")}


def count(dataset: Dataset, *, label_images: int = 0, seed: int = 0) -> tuple[SplitCounts, ...]:
    """Count every split of a dataset from its index.

    Verified labels and flags are counted in the annotations of `label_images` images per split, chosen by a hash with
    the seed: two small requests per image. A SampleError is raised if they cannot be read.
    """
    return tuple(_count_split(dataset, split, label_images, seed) for split in dataset.splits)


def totals(splits: Sequence[SplitCounts]) -> pd.DataFrame:
    """Return the `classes` of all splits together, with the columns of `add_box_only`."""
    import pandas as pd

    if not splits:
        return add_box_only(pd.DataFrame(columns=["id", "name", *COUNTS]))
    classes = splits[0].classes.copy()
    classes[[*COUNTS]] = sum(split.classes[[*COUNTS]] for split in splits)
    return add_box_only(classes)


def add_box_only(classes: pd.DataFrame) -> pd.DataFrame:
    """Add the number of objects that have a box only, and their share from 0 to 1 in all objects.

    Objects are all boxes except group-of regions; one with a predicted mask has more than a box. The share is missing
    for a class without objects.
    """
    objects = classes["boxes"] - classes["groups"]
    box_only = (objects - classes["masks"] - classes["predicted"]).clip(lower=0)
    return classes.assign(objects=objects, box_only=box_only, box_only_share=box_only / objects.where(objects > 0))


def _count_split(dataset: Dataset, split: str, label_images: int, seed: int) -> SplitCounts:
    import pandas as pd

    index = dataset.index(split)
    classes = pd.DataFrame([(category.id, category.name) for category in dataset.categories], columns=["id", "name"])
    for name, column in COUNTS.items():
        classes[name] = classes["id"].map(index.counts(column, dataset.categories))
    shards = [shard.nbytes for shard in dataset.info.shards if shard.split == split]
    sizes = labels = None
    if len(index):
        portrait = float(np.mean(index.height > index.width))
        sizes = Sizes(_spread(index.width), _spread(index.height), portrait)
        if label_images:
            labels = _count_labels(read_annotations(dataset.root, index, first_rows(index, label_images, seed)))
    return SplitCounts(split, len(index), len(shards), sum(shards), sizes, classes, labels)


def _spread(values: NDArray[np.int32]) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def _count_labels(samples: Sequence[Sample]) -> LabelCounts:
    present = Counter(number for sample in samples for number in sample.verified_present)
    absent = Counter(number for sample in samples for number in sample.verified_absent)
    instances = [instance for sample in samples for instance in sample.instances]
    return LabelCounts(
        images=len(samples),
        classes={number: {"present": present[number], "absent": absent[number]} for number in sorted(present | absent)},
        objects=len(instances),
        flags={flag: sum(getattr(instance, flag) for instance in instances) for flag in FLAGS},
    )
