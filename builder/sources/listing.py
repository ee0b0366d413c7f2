"""Sources that list all their images and objects in files of moderate size: read whole, and kept in memory.

The key of an image is its id at the source; if there is more than one split, it begins with the split's name, because
each split may count from 1.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import unquote

from builder.sources.base import Candidates, ClassTotals, Filters, candidates_by_class
from builder.sources.coco_categories import without_cycles
from builder.sources.taxonomy import Classes, Taxonomy
from builder.tasks.plan import (
    Annotation,
    Box,
    FractionalPolygon,
    InlineMask,
    Metadata,
    PlannedImage,
    PlannedObject,
    Size,
    StatedFile,
)
from shards.common.errors import UserError
from shards.common.redact import redact_url
from shards.format.sample import KEY, MaskPrediction
from shards.storage.explain import storage_errors
from shards.storage.location import Location


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object as its source describes it; the fields are those of `Annotation`, before classes are chosen.

    `flags` are the names of the attributes of `Annotation` that are True.
    """

    label: str
    box: Box
    mask: InlineMask | FractionalPolygon | None = None
    mask_path: str = ""
    box_id: str = ""
    predicted_iou: float | None = None
    area: float | None = None
    prediction: MaskPrediction | None = None
    flags: tuple[str, ...] = ()

    def planned(self, category_id: int) -> PlannedObject:
        """Return the object as one of a class of the dataset."""
        found = Annotation(
            category_id,
            self.label,
            self.box,
            self.mask_path,
            self.box_id,
            self.predicted_iou,
            area=self.area,
            prediction=self.prediction,
            **dict.fromkeys(self.flags, True),
        )
        return PlannedObject(found, self.mask)


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image and its objects.

    Attributes:
        key: key of its sample.
        id: how the source identifies it.
        file_name: its path under the root of the images.
        size: (width, height) in pixels that its annotations are for; None if the source does not state it.
        absent: labels that are verified absent; None if every label was looked for in the image.
        present: labels that are verified present; None if these are the labels of its objects.
        uncertain: labels of which not every object is annotated.
    """

    key: str
    id: int | str
    file_name: str
    size: Size | None
    metadata: Metadata
    objects: Sequence[ListedObject] = ()
    absent: tuple[str, ...] | None = None
    present: tuple[str, ...] | None = None
    uncertain: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """A split of a source: names of all its classes, those of their parents where they have one, and images by key."""

    names: tuple[str, ...]
    images: Mapping[str, ListedImage]
    parents: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ListedSource(ABC):
    """An image root and a file or folder of annotations per split (a `builder.sources.base.Source`).

    Attributes:
        named: whether keys begin with the split.
        roots: roots of splits whose images are not under the common root.
    """

    images: Location
    files: tuple[tuple[str, Location], ...]
    named: bool = False
    roots: tuple[tuple[str, Location], ...] = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the source in `dataset.json`."""

    @property
    @abstractmethod
    def image_layout(self) -> str:
        """Where the images are under their root, for messages."""

    @abstractmethod
    def _read(self, split: str, location: Location, prefix: str) -> Listing:
        """Read a split, whose keys begin with `prefix`; a UserError if its annotations are damaged."""

    @property
    def image_roots(self) -> tuple[Location, ...]:
        """The roots of the splits, each once."""
        return tuple(dict.fromkeys(self.root_of(split) for split in self.splits))

    def root_of(self, split: str) -> Location:
        """Return the root of the images of a split."""
        return dict(self.roots).get(split, self.images)

    @property
    def annotations(self) -> Location:
        """The first file."""
        return self.files[0][1]

    @property
    def splits(self) -> Mapping[str, str]:
        """The splits that have files."""
        return {split: split for split, _ in self.files}

    def origin(self) -> dict[str, str]:
        """Return what `dataset.json` records about the source."""
        urls = {split: redact_url(location.url) for split, location in self.files}
        files = " ".join(f"{split}={url}" if self.named else url for split, url in urls.items())
        roots = " ".join(f"{split}={redact_url(root.url)}" for split, root in self.roots)
        return {"name": self.name, "images": roots or self.images.url, "annotations": files}

    def taxonomy(self) -> Taxonomy:
        """Return the classes of all splits by name; supercategories are their parents."""
        names: dict[str, str] = {}
        children: dict[str, set[str]] = defaultdict(set)
        for listing in self._listings.values():
            names |= {name: name for name in listing.names}
            for name, parent in listing.parents.items():
                children[parent].add(name)
        groups = frozenset(children.keys() - names.keys())
        acyclic = without_cycles(children, "--annotations")
        subcategories = {parent: frozenset(found) for parent, found in acyclic.items()}
        names |= {name: name for name in groups}
        return Taxonomy(names, subcategories, groups, "the categories of --annotations")

    def open_split(self, split: str, classes: Classes, filters: Filters) -> ListedSplit:
        """Open one of `splits`."""
        return ListedSplit(self.root_of(split), self._listings[split], classes, filters)

    @cached_property
    def _listings(self) -> Mapping[str, Listing]:
        return {split: self._read(split, location, f"{split}-" if self.named else "") for split, location in self.files}


@dataclass(frozen=True)
class ListedSplit:
    """A split, restricted to the chosen classes and the filters (a `builder.sources.base.SourceSplit`)."""

    root: Location
    listing: Listing
    classes: Classes
    filters: Filters

    def candidates(self) -> dict[int, Candidates]:
        """Return a dict from ids of requested classes to images with masks and with boxes only, after filters."""
        masked: dict[int, set[str]] = defaultdict(set)
        boxed: dict[int, set[str]] = defaultdict(set)
        for image in self.listing.images.values():
            for planned in self._objects(image):
                (masked if planned.has_mask else boxed)[planned.annotation.category_id].add(image.key)
        return candidates_by_class(self.classes, masked, boxed)

    def totals(self) -> dict[int, ClassTotals]:
        """Return a dict from category ids to what the split has of the class, after filters."""
        images, masks, boxes = Counter[int](), Counter[int](), Counter[int]()
        for image in self.listing.images.values():
            objects = self._objects(image)
            images.update({planned.annotation.category_id for planned in objects})
            boxes.update(planned.annotation.category_id for planned in objects)
            masks.update(planned.annotation.category_id for planned in objects if planned.has_mask)
        return {
            category: ClassTotals(images[category], masks[category], boxes[category]) for category in sorted(images)
        }

    def backgrounds(self) -> tuple[str, ...]:
        """Return the images without an object of the requested classes, whatever the filters, sorted.

        If only some classes were looked for in an image, one of the requested classes must be among those.
        """
        wanted = frozenset(self.classes.wanted_labels)
        held = {
            image.key
            for image in self.listing.images.values()
            if any(found.label in wanted for found in image.objects)
            or (image.absent is not None and not wanted.intersection(image.absent))
        }
        return tuple(sorted(self.listing.images.keys() - held))

    def find(self, names: Collection[str]) -> dict[str, str]:
        """Return the keys of images given by key, id, or file name (with or without `.jpg`)."""
        known: dict[str, str] = {}
        for naming in (lambda i: i.key, lambda i: str(i.id), lambda i: i.file_name.removesuffix(".jpg")):
            for image in self.listing.images.values():
                known.setdefault(naming(image), image.key)
        return {name: known[name] for name in names if name in known}

    def describe(self, image_ids: Collection[str]) -> dict[str, PlannedImage]:
        """Return everything that the source states about the images."""
        return {key: self._describe(self.listing.images[key]) for key in sorted(image_ids)}

    def _describe(self, image: ListedImage) -> PlannedImage:
        labels = {found.label for found in image.objects}
        known = frozenset(name for label in labels for name in self._with_parents(label))
        absent = self._labels if image.absent is None else frozenset(image.absent)
        objects = self._objects(image)
        not_exhaustive = self.classes.holding(frozenset(image.uncertain))
        verified_present, verified_absent = self.classes.verified(
            frozenset(labels if image.present is None else image.present),
            absent - known - frozenset(image.uncertain),
            frozenset(planned.annotation.category_id for planned in objects).union(not_exhaustive),
        )
        width, height = image.size or (None, None)
        return PlannedImage(
            image_id=image.key,
            url=(self.root / image.file_name).url,
            objects=objects,
            verified_present=verified_present,
            verified_absent=verified_absent,
            metadata=image.metadata,
            stated=StatedFile(image.file_name, width, height),
            not_exhaustive=not_exhaustive or None,
        )

    @cached_property
    def _labels(self) -> frozenset[str]:
        return frozenset(self.listing.names) | frozenset(self.listing.parents.values())

    def _with_parents(self, name: str) -> set[str]:
        found: set[str] = set()
        step: str | None = name
        while step is not None and step not in found:
            found.add(step)
            step = self.listing.parents.get(step)
        return found

    def _objects(self, image: ListedImage) -> tuple[PlannedObject, ...]:
        owners = self.classes.owners
        return self.filters.apply(
            found.planned(owners[found.label]) for found in image.objects if found.label in owners
        )


def sample_key(image_id: int | str, prefix: str = "") -> str:
    """Return the key of a sample for the id of an image; different ids have different keys.

    Numbers are padded to 12 digits. An id that cannot be a key is replaced by its usable characters and a hash.
    """
    text = f"{image_id:012d}" if isinstance(image_id, int) else image_id
    if KEY.fullmatch(prefix + text):
        return prefix + text
    safe = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:40] or "image"
    return f"{prefix}{safe}-{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"


def parse_places(texts: Sequence[str], option: str = "--annotations") -> tuple[tuple[tuple[str, str], ...], bool]:
    """Parse `--annotations` or `--images` into (split, URL) pairs, and whether the splits were named."""
    named = [re.fullmatch(r"(train|val|test)=(.+)", text) for text in texts]
    found = [(match[1], match[2]) for match in named if match]
    if len(texts) == 1 and not found:
        return (("train", texts[0]),), False
    if len(found) != len(texts) or len(dict(found)) != len(found):
        raise UserError(
            f"{option} {' '.join(texts)[:200]}: give one URL, or one per split as train=URL val=URL test=URL"
        )
    return tuple(found), True


def files_under(folder: Location) -> list[str]:
    """Return the paths of all files in a folder and its subfolders, relative to it, sorted; none if there is none.

    Links to local folders are followed, except to one that they are in.
    """
    with storage_errors(folder.url):
        paths = list(_local_files(folder.path)) if folder.is_local else folder.fs.find(folder.path)
    start = folder.path.rstrip("/") + "/"
    found = (str(path)[len(start) :] for path in paths if str(path).startswith(start))
    return sorted(map(unquote, found) if folder.protocol in ("http", "https") else found)


def _local_files(folder: str) -> Iterator[str]:
    def stop(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for here, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        own = os.path.join(os.path.realpath(here), "")
        inner = {name: os.path.join(os.path.realpath(os.path.join(here, name)), "") for name in folders}
        folders[:] = [name for name, place in inner.items() if not own.startswith(place)]
        yield from (os.path.join(here, name) for name in files)
