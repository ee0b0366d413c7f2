"""What the builder asks of a place that images and annotations come from.

A source is opened a split at a time. All that selection needs is which images count for which class; all that packing
needs is a `PlannedImage`. `builder.sources.openimages.source` and `builder.sources.coco` are the sources that there
are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from builder.tasks.plan import PlannedImage, PlannedObject, Withheld
from shards.storage.location import Location

if TYPE_CHECKING:
    from builder.sources.taxonomy import Classes, Taxonomy
    from builder.tasks.candidates import Candidates

# What --drop calls the flags of an annotation.
FLAGS = {
    "depiction": "is_depiction",
    "inside": "is_inside",
    "truncated": "is_truncated",
    "occluded": "is_occluded",
    "group-of": "is_group_of",
}


@dataclass(frozen=True)
class Filters:
    """Which annotations and masks are wanted.

    Attributes:
        min_predicted_iou: a mask below it is left out, and its object stays as a box; a mask without an estimate stays.
        drop: names of `FLAGS`; an annotation that has one of them is left out whole.
        require_mask: only images with a mask of a class count for it.
    """

    min_predicted_iou: float = 0.0
    drop: tuple[str, ...] = ()
    require_mask: bool = False

    def apply(self, objects: Iterable[PlannedObject]) -> tuple[PlannedObject, ...]:
        """What is left of an image's objects; a mask that is left out becomes `Withheld`."""
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
        return PlannedObject(planned.annotation, Withheld("mask-filtered", detail))


class SourceSplit(Protocol):
    """One split of a source, as the chosen classes and the filters show it. Image ids are keys of samples."""

    def candidates(self) -> Mapping[int, Candidates]:
        """Id of each class that was asked for -> the images that count for it, each list sorted."""
        ...

    def find(self, names: Collection[str]) -> Mapping[str, str]:
        """Images as a user's list names them -> image ids; names that the split does not know are left out."""
        ...

    def describe(self, image_ids: Collection[str]) -> Mapping[str, PlannedImage]:
        """All that is known of the images: where each and its masks lie, annotations, verified classes, attribution."""
        ...


class Source(Protocol):
    """A place that images and annotations come from. It holds only where things are, and may be sent to workers.

    All methods raise UserError for damaged annotations and StorageError for a place that cannot be had.
    """

    @property
    def images(self) -> Location:
        """The root of the images."""
        ...

    @property
    def annotations(self) -> Location:
        """What the annotations are read from; mask zips are read with its access settings."""
        ...

    @property
    def splits(self) -> Mapping[str, str]:
        """Our names of the splits that the source has -> its own names."""
        ...

    def origin(self) -> dict[str, str]:
        """What `dataset.json` records: the source's name and addresses."""
        ...

    def taxonomy(self) -> Taxonomy:
        """All classes."""
        ...

    def open_split(self, split: str, classes: Classes, filters: Filters) -> SourceSplit:
        """One split, by the source's own name."""
        ...
