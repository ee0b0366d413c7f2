"""The interface between the builder and its sources: `openimages.source` and subclasses of `listing.ListedSource`."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from builder.sources.taxonomy import Classes, Taxonomy
from builder.tasks.plan import Box, Failure, PlannedImage, PlannedObject
from shards.format.accounts import FILTERED
from shards.storage.location import Location

# A file name, perhaps in folders: any characters of one line, but no path that leaves its root.
FILE_NAME = re.compile(r"(?!/)(?!.*(?:^|/)\.{0,2}(?:/|$))[^\\\x00-\x1f]{1,1024}")
FAR = 2.0  # image lengths: a box that reaches further from the image's origin than this is damaged

# Name of a flag for --drop -> attribute of an annotation.
FLAGS = {
    "depiction": "is_depiction",
    "inside": "is_inside",
    "truncated": "is_truncated",
    "occluded": "is_occluded",
    "group-of": "is_group_of",
}


def has_extent(box: Box) -> bool:
    """Return whether a box (x1, x2, y1, y2), in fractions of the image, has an extent inside of it."""
    x1, x2, y1, y2 = box
    return min(x2, 1) > max(x1, 0) and min(y2, 1) > max(y1, 0)


@dataclass(frozen=True)
class Filters:
    """Which annotations and masks to leave out.

    Attributes:
        min_predicted_iou: Masks with a lower estimate become boxes; those without an estimate stay.
        drop: Names of `FLAGS`; annotations with any of these flags are left out.
        require_mask: Only images with a mask of a class count for it.
    """

    min_predicted_iou: float = 0.0
    drop: tuple[str, ...] = ()
    require_mask: bool = False

    def apply(self, objects: Iterable[PlannedObject]) -> tuple[PlannedObject, ...]:
        """Return the remaining objects of an image; a mask that is left out becomes a `Failure`."""
        dropped = [FLAGS[name] for name in self.drop]
        return tuple(
            self._without_bad_mask(planned)
            for planned in objects
            if not any(getattr(planned.annotation, flag) for flag in dropped)
        )

    def _without_bad_mask(self, planned: PlannedObject) -> PlannedObject:
        iou = planned.annotation.predicted_iou
        if not planned.annotation.mask_path or iou is None or iou >= self.min_predicted_iou:
            return planned
        detail = f"predicted IoU {iou:g}, --min-predicted-iou is {self.min_predicted_iou:g}"
        return PlannedObject(planned.annotation, Failure(FILTERED, detail))


@dataclass(frozen=True, slots=True)
class ClassTotals:
    """What a split of a source has of a class: images with an object of it, masks, and boxes (with or without one)."""

    images: int = 0
    masks: int = 0
    boxes: int = 0


@dataclass(frozen=True)
class Candidates:
    """Images that count for a class: those with a mask of it, and those that only have boxes of it; disjoint."""

    masked: tuple[str, ...] = ()
    boxed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.masked) + len(self.boxed)


def candidates_by_class(
    classes: Classes, masked: Mapping[int, set[str]], boxed: Mapping[int, set[str]]
) -> dict[int, Candidates]:
    """Return the candidates of each requested class, sorted, from its images with masks and its images with boxes."""
    none: set[str] = set()
    pairs = {c.id: (masked.get(c.id, none), boxed.get(c.id, none)) for c in classes.wanted}
    return {c: Candidates(tuple(sorted(mask)), tuple(sorted(box - mask))) for c, (mask, box) in pairs.items()}


class SourceSplit(Protocol):
    """One split of a source, restricted to the chosen classes and the filters. Image ids are the keys of samples."""

    def candidates(self) -> Mapping[int, Candidates]:
        """Return a dict from the id of each requested class to the images that count for it, sorted."""

    def totals(self) -> Mapping[int, ClassTotals]:
        """Return a dict from category ids to what the split has of the class, without those it has nothing of."""

    def backgrounds(self) -> Sequence[str]:
        """Return the images that are known to hold no object of the requested classes, sorted."""

    def find(self, names: Collection[str]) -> Mapping[str, str]:
        """Return a dict from names of images in a user's list to image ids, without unknown names."""

    def describe(self, image_ids: Collection[str]) -> Mapping[str, PlannedImage]:
        """Return a dict from image ids to locations of image and masks, annotations, verified classes, attribution."""


class Source(Protocol):
    """A source of images and annotations. It holds only locations, and may be sent to workers.

    All methods raise UserError for damaged annotations and StorageError for a location that cannot be reached or read.
    """

    @property
    def images(self) -> Location:
        """The root of the images."""

    @property
    def image_roots(self) -> Sequence[Location]:
        """All roots of images: one, or one per split; `images` is the first."""

    @property
    def image_layout(self) -> str:
        """Where the images are under their root, for messages."""

    @property
    def annotations(self) -> Location:
        """The root of the annotations; mask zips are read with its access settings."""

    @property
    def splits(self) -> Mapping[str, str]:
        """A dict from split names of a shard dataset to the source's names of these splits."""

    def origin(self) -> dict[str, str]:
        """Return what `dataset.json` records: the source's name and addresses."""

    def taxonomy(self) -> Taxonomy:
        """Return all classes."""

    def open_split(self, split: str, classes: Classes, filters: Filters) -> SourceSplit:
        """Open one split, by the source's name."""
