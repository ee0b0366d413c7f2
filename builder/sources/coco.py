"""COCO as a source: images under a root, annotations and masks in instances files.

COCO's annotators searched every image for every category, so a category without an object in an image is verified
absent there. The key of an image is its id; if several files are given, it begins with the split's name, because each
file may count from 1. The file name is the sample's title.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from builder.fetching.fetch import Request, fetch_one
from builder.sources.base import Candidates, ClassTotals, Filters, candidates_by_class
from builder.sources.coco_categories import without_cycles
from builder.sources.coco_instances import CocoImage, Instances, fractional_box, parse_instances
from builder.sources.taxonomy import Classes, Taxonomy
from builder.tasks.plan import Annotation, InlineMask, PlannedImage, PlannedObject, StatedFile
from shards.common.errors import UserError
from shards.common.redact import redact_url
from shards.storage.location import Location


@dataclass(frozen=True)
class Coco:
    """An image root and a file per split (a `builder.sources.base.Source`); if `named`, keys begin with the split.

    `roots` are those of splits whose images are not under the common root.
    """

    images: Location
    files: tuple[tuple[str, Location], ...]
    named: bool = False
    roots: tuple[tuple[str, Location], ...] = ()

    @property
    def image_roots(self) -> tuple[Location, ...]:
        """The roots of the splits, each once."""
        return tuple(dict.fromkeys(self.root_of(split) for split in self.splits))

    def root_of(self, split: str) -> Location:
        """Return the root of the images of a split."""
        return dict(self.roots).get(split, self.images)

    @property
    def image_layout(self) -> str:
        """Where the images are under their root, for messages."""
        return "<root>/<file_name>, with each file_name as in --annotations"

    @property
    def annotations(self) -> Location:
        """The first file."""
        return self.files[0][1]

    @property
    def splits(self) -> Mapping[str, str]:
        """The splits that have files."""
        return {split: split for split, _ in self.files}

    @property
    def name(self) -> str:
        """The name of the source in `dataset.json`."""
        return "COCO"

    def origin(self) -> dict[str, str]:
        """Return what `dataset.json` records about the source."""
        urls = {split: redact_url(location.url) for split, location in self.files}
        files = " ".join(f"{split}={url}" if self.named else url for split, url in urls.items())
        roots = " ".join(f"{split}={redact_url(root.url)}" for split, root in self.roots)
        return {"name": self.name, "images": roots or self.images.url, "annotations": files}

    def taxonomy(self) -> Taxonomy:
        """Return the categories of all files by name; supercategories are their parents."""
        names: dict[str, str] = {}
        children: dict[str, set[str]] = defaultdict(set)
        for instances in self._instances.values():
            names |= {name: name for name in instances.names.values()}
            for name, parent in instances.parents.items():
                children[parent].add(name)
        groups = frozenset(children.keys() - names.keys())
        acyclic = without_cycles(children, "--annotations")
        subcategories = {parent: frozenset(found) for parent, found in acyclic.items()}
        names |= {name: name for name in groups}
        return Taxonomy(names, subcategories, groups, "the categories of --annotations")

    def open_split(self, split: str, classes: Classes, filters: Filters) -> CocoSplit:
        """Open one of `splits`."""
        return CocoSplit(self.root_of(split), self._instances[split], classes, filters)

    @cached_property
    def _instances(self) -> Mapping[str, Instances]:
        return {
            split: self._parse(fetch_one(Request(location)), str(location), f"{split}-" if self.named else "")
            for split, location in self.files
        }

    def _parse(self, data: bytes, where: str, prefix: str) -> Instances:
        return parse_instances(data, where, prefix)


@dataclass(frozen=True)
class Lvis(Coco):
    """LVIS (https://www.lvisdataset.org/dataset): COCO's images, in which only some categories were looked for."""

    @property
    def name(self) -> str:
        """The name of the source in `dataset.json`."""
        return "LVIS"

    @property
    def image_layout(self) -> str:
        """Where the images are under their root, for messages."""
        return "<root>/train2017/<file> and <root>/val2017/<file>, as in the coco_url of each image"

    def _parse(self, data: bytes, where: str, prefix: str) -> Instances:
        return parse_instances(data, where, prefix, lvis=True)


@dataclass(frozen=True)
class CocoSplit:
    """One file, restricted to the chosen classes and the filters (a `builder.sources.base.SourceSplit`)."""

    root: Location
    instances: Instances
    classes: Classes
    filters: Filters

    def candidates(self) -> dict[int, Candidates]:
        """Return a dict from ids of requested classes to images with masks and with boxes only, after filters."""
        masked: dict[int, set[str]] = defaultdict(set)
        boxed: dict[int, set[str]] = defaultdict(set)
        for image in self.instances.images.values():
            for planned in self._objects(image):
                (masked if planned.has_mask else boxed)[planned.annotation.category_id].add(image.key)
        return candidates_by_class(self.classes, masked, boxed)

    def totals(self) -> dict[int, ClassTotals]:
        """Return a dict from category ids to what the file has of the class, after filters."""
        images, masks, boxes = Counter[int](), Counter[int](), Counter[int]()
        for image in self.instances.images.values():
            objects = self._objects(image)
            images.update({planned.annotation.category_id for planned in objects})
            boxes.update(planned.annotation.category_id for planned in objects)
            masks.update(planned.annotation.category_id for planned in objects if planned.has_mask)
        return {
            category: ClassTotals(images[category], masks[category], boxes[category]) for category in sorted(images)
        }

    def backgrounds(self) -> tuple[str, ...]:
        """Return the images without an annotation of the requested classes, whatever the filters, sorted.

        If only some categories were looked for in an image, one of the requested classes must be among those.
        """
        wanted = frozenset(self.classes.wanted_labels)
        names = self.instances.names
        held = {
            image.key
            for image in self.instances.images.values()
            if any(names[annotation["category_id"]] in wanted for _, annotation in image.annotations)
            or (image.absent is not None and not wanted.intersection(image.absent))
        }
        return tuple(sorted(self.instances.images.keys() - held))

    def find(self, names: Collection[str]) -> dict[str, str]:
        """Return the keys of images given by key, id, or file name (with or without `.jpg`)."""
        known: dict[str, str] = {}
        for naming in (lambda i: i.key, lambda i: str(i.id), lambda i: i.file_name.removesuffix(".jpg")):
            for image in self.instances.images.values():
                known.setdefault(naming(image), image.key)
        return {name: known[name] for name in names if name in known}

    def describe(self, image_ids: Collection[str]) -> dict[str, PlannedImage]:
        """Return everything that the file states about the images."""
        return {key: self._describe(self.instances.images[key]) for key in sorted(image_ids)}

    def _describe(self, image: CocoImage) -> PlannedImage:
        labels = {self.instances.names[annotation["category_id"]] for _, annotation in image.annotations}
        known = frozenset(name for label in labels for name in self._with_parents(label))
        everything = frozenset(self.instances.names.values()) | frozenset(self.instances.parents.values())
        absent = everything - known if image.absent is None else frozenset(image.absent) - known - {*image.uncertain}
        objects = self._objects(image)
        verified_present, verified_absent = self.classes.verified(
            frozenset(labels if image.present is None else image.present),
            absent,
            frozenset(planned.annotation.category_id for planned in objects),
        )
        return PlannedImage(
            image_id=image.key,
            url=(self.root / image.file_name).url,
            objects=objects,
            verified_present=verified_present,
            verified_absent=verified_absent,
            metadata=image.metadata,
            stated=StatedFile(image.file_name, image.width, image.height),
            not_exhaustive=self.classes.holding(frozenset(image.uncertain)) or None,
        )

    def _with_parents(self, name: str) -> set[str]:
        found: set[str] = set()
        step: str | None = name
        while step is not None and step not in found:
            found.add(step)
            step = self.instances.parents.get(step)
        return found

    def _objects(self, image: CocoImage) -> tuple[PlannedObject, ...]:
        found = []
        for number, annotation in image.annotations:
            label = self.instances.names[annotation["category_id"]]
            if label in self.classes.owners:
                found.append(_planned(image, number, annotation, label, self.classes.owners[label]))
        return self.filters.apply(found)


def _planned(image: CocoImage, number: int, annotation: Mapping[str, Any], label: str, category: int) -> PlannedObject:
    segmentation = annotation.get("segmentation")
    iou: Any = annotation.get("predicted_iou")
    area: Any = annotation.get("area")
    found = Annotation(
        category_id=category,
        label=label,
        box=fractional_box(annotation.get("bbox"), image.width, image.height),
        mask_path=f"annotations[{number}]" if segmentation else "",
        box_id=str(annotation.get("id", ""))[:64],
        predicted_iou=float(iou) if type(iou) in (int, float) and 0 <= iou <= 1 else None,
        is_group_of=annotation.get("iscrowd") == 1,
        area=float(area) if type(area) in (int, float) and 0 <= area < math.inf else None,
    )
    return PlannedObject(found, InlineMask(image.width, image.height, segmentation) if segmentation else None)


def parse_places(texts: Sequence[str], option: str = "--annotations") -> tuple[tuple[tuple[str, str], ...], bool]:
    """Parse `--annotations` or `--images` for COCO into (split, URL) pairs, and whether the splits were named."""
    named = [re.fullmatch(r"(train|val|test)=(.+)", text) for text in texts]
    found = [(match[1], match[2]) for match in named if match]
    if len(texts) == 1 and not found:
        return (("train", texts[0]),), False
    if len(found) != len(texts) or len(dict(found)) != len(found):
        raise UserError(
            f"{option} {' '.join(texts)[:200]}: give one URL, or one per split as train=URL val=URL test=URL"
        )
    return tuple(found), True
