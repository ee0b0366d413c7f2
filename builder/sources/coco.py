"""COCO's instances JSON as a source: images below a root, masks as polygons or run lengths in the annotations.

Format: https://cocodataset.org/#format-data. Read as well, where they are present: LVIS' `neg_category_ids` and
`not_exhaustive_category_ids` (https://www.lvisdataset.org/dataset), and `predicted_iou` as SA-1B has it.

COCO's annotators went through every image for every category, so a category without an object in an image is verified
absent there. An image's key is its id: a number is padded to 12 digits, as COCO's own file names are, and what cannot
be a key is replaced by what can and a hash. Where several files are given, the split's name is put before it, since
each file may count from 1. The file's name is kept as the sample's title.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from builder.fetching.fetch import Request, fetch_one
from builder.sources.base import Filters
from builder.sources.taxonomy import Classes, Taxonomy
from builder.tasks.candidates import Candidates
from builder.tasks.plan import Annotation, InlineMask, Metadata, PlannedImage, PlannedObject
from shards.common.errors import UserError
from shards.common.text import counted
from shards.format.sample import KEY
from shards.storage.location import Location

LONGEST_SIDE = 1 << 16  # pixels
FAR = 2.0  # image lengths: a box that reaches further outside than this is none
FILE_NAME = re.compile(r"(?!/)(?!.*(?:^|/)\.{0,2}(?:/|$))[^\\\x00-\x1f]{1,1024}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Image:
    """One image of a file, and its annotations as the file has them (`segmentation` as JSON text)."""

    key: str
    id: int | str
    file_name: str
    width: int
    height: int
    metadata: Metadata
    absent: tuple[str, ...] | None
    uncertain: tuple[str, ...]
    annotations: list[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class _Document:
    """One file: category id -> name, name -> supercategory (of categories that have another one), key -> image."""

    names: Mapping[int, str]
    parents: Mapping[str, str]
    images: Mapping[str, _Image]


@dataclass(frozen=True)
class Coco:
    """An image root and instances files (a `builder.sources.base.Source`).

    Attributes:
        images: what the files' `file_name` is relative to.
        files: our name of a split -> its file.
        named: the user named the splits, so the keys begin with them.
    """

    images: Location
    files: tuple[tuple[str, Location], ...]
    named: bool = False

    @property
    def annotations(self) -> Location:
        """The first file."""
        return self.files[0][1]

    @property
    def splits(self) -> Mapping[str, str]:
        """The splits that there are files for."""
        return {split: split for split, _ in self.files}

    def origin(self) -> dict[str, str]:
        """What `dataset.json` records of the source."""
        files = " ".join(f"{split}={location}" if self.named else str(location) for split, location in self.files)
        return {"name": "COCO", "images": self.images.url, "annotations": files}

    def taxonomy(self) -> Taxonomy:
        """The categories of all files by name; a supercategory has those below it as kinds."""
        names: dict[str, str] = {}
        children: dict[str, set[str]] = defaultdict(set)
        for document in self._documents.values():
            names |= {name: name for name in document.names.values()}
            for name, parent in document.parents.items():
                children[parent].add(name)
        groups = frozenset(children) - frozenset(names)
        kinds = {parent: frozenset(found) for parent, found in children.items()}
        return Taxonomy(names | {name: name for name in groups}, kinds, groups, "the categories of --annotations")

    def open_split(self, split: str, classes: Classes, filters: Filters) -> CocoSplit:
        """One of `splits`."""
        return CocoSplit(self.images, self._documents[split], classes, filters)

    @cached_property
    def _documents(self) -> Mapping[str, _Document]:
        return {
            split: parse_instances(fetch_one(Request(location)), str(location), f"{split}-" if self.named else "")
            for split, location in self.files
        }


@dataclass(frozen=True)
class CocoSplit:
    """One file, as the chosen classes and the filters show it (a `builder.sources.base.SourceSplit`)."""

    root: Location
    document: _Document
    classes: Classes
    filters: Filters

    def candidates(self) -> dict[int, Candidates]:
        """Id of each class that was asked for -> images with a mask of it, and with boxes only, past the filters."""
        masked: dict[int, set[str]] = defaultdict(set)
        boxed: dict[int, set[str]] = defaultdict(set)
        for image in self.document.images.values():
            for planned in self._objects(image):
                (masked if planned.has_mask else boxed)[planned.annotation.category_id].add(image.key)
        return {
            category.id: Candidates(
                tuple(sorted(masked[category.id])), tuple(sorted(boxed[category.id] - masked[category.id]))
            )
            for category in self.classes.wanted
        }

    def find(self, names: Collection[str]) -> dict[str, str]:
        """Images by key, id, or file name (with or without `.jpg`)."""
        known: dict[str, str] = {}
        for naming in (lambda i: i.key, lambda i: str(i.id), lambda i: i.file_name.removesuffix(".jpg")):
            for image in self.document.images.values():
                known.setdefault(naming(image), image.key)
        return {name: known[name] for name in names if name in known}

    def describe(self, image_ids: Collection[str]) -> dict[str, PlannedImage]:
        """All that the file says of the images."""
        return {key: self._describe(self.document.images[key]) for key in sorted(image_ids)}

    def _describe(self, image: _Image) -> PlannedImage:
        labels = {self.document.names[annotation["category_id"]] for _, annotation in image.annotations}
        present = frozenset(name for label in labels for name in self._upwards(label))
        everything = frozenset(self.document.names.values()) | frozenset(self.document.parents.values())
        absent = everything - present if image.absent is None else frozenset(image.absent) - present
        objects = self._objects(image)
        verified_present, verified_absent = self.classes.verified(
            frozenset(labels.difference(image.uncertain)),
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
        )

    def _upwards(self, name: str) -> set[str]:
        found: set[str] = set()
        step: str | None = name
        while step is not None and step not in found:
            found.add(step)
            step = self.document.parents.get(step)
        return found

    def _objects(self, image: _Image) -> tuple[PlannedObject, ...]:
        found = []
        for number, annotation in image.annotations:
            label = self.document.names[annotation["category_id"]]
            if label in self.classes.owners:
                found.append(_planned(image, number, annotation, label, self.classes.owners[label]))
        return self.filters.apply(found)


def _planned(image: _Image, number: int, annotation: Mapping[str, Any], label: str, category: int) -> PlannedObject:
    segmentation = annotation.get("segmentation")
    iou: Any = annotation.get("predicted_iou")
    found = Annotation(
        category_id=category,
        label=label,
        box=_box(annotation.get("bbox"), image),
        mask_path=f"annotations[{number}]" if segmentation else "",
        box_id=str(annotation.get("id", ""))[:64],
        predicted_iou=float(iou) if type(iou) in (int, float) and 0 <= iou <= 1 else None,
        is_group_of=annotation.get("iscrowd") == 1,
    )
    return PlannedObject(found, InlineMask(image.width, image.height, segmentation) if segmentation else None)


def _box(bbox: Any, image: _Image) -> tuple[float, float, float, float]:
    """(x, y, w, h) in pixels to (x1, x2, y1, y2) as fractions; all 0 where it is no box."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return 0.0, 0.0, 0.0, 0.0
    if not all(type(value) in (int, float) and abs(value) <= 4 * LONGEST_SIDE for value in bbox):  # false for NaN
        return 0.0, 0.0, 0.0, 0.0
    x, y, w, h = bbox
    box = (x / image.width, (x + w) / image.width, y / image.height, (y + h) / image.height)
    inside = all(abs(value) <= FAR for value in box)
    return box if inside and min(box[1], 1) > max(box[0], 0) and min(box[3], 1) > max(box[2], 0) else (0.0,) * 4


def parse_instances(data: bytes, where: str, prefix: str = "") -> _Document:
    """Read an instances JSON.

    Args:
        data: of the file.
        where: the file, for messages.
        prefix: of the keys.

    Raises:
        UserError: not such a JSON, or one that contradicts itself.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_hook=_compact)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({str(error)[:120]}): --annotations takes COCO instances files") from error
    for name in ("images", "annotations", "categories"):
        rows = value.get(name) if isinstance(value, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{where}: has no list {name!r} of objects: --annotations takes COCO instances files")
    names, parents = _categories(value["categories"], where)
    licenses = value.get("licenses")
    images = _images(value["images"], licenses if isinstance(licenses, list) else [], names, where, prefix)
    _assign(value["annotations"], images, names, where)
    return _Document(names, parents, {image.key: image for image in images.values()})


def _compact(value: dict[str, Any]) -> dict[str, Any]:
    """A segmentation as text, while the file is still being parsed: as numbers it takes ten times the memory."""
    if "segmentation" in value:
        found = value["segmentation"]
        value["segmentation"] = json.dumps(found, separators=(",", ":")) if found else ""
    return value


def _get(row: Mapping[str, Any], key: str, kinds: tuple[type, ...], place: str) -> Any:
    """A value that must be there and of one of the types; a bool is no number."""
    found = row.get(key)
    if type(found) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{place}: {key!r} is {str(found)[:60]!r}, not of type {wanted}: correct the file")
    return found


def _categories(rows: Sequence[Mapping[str, Any]], where: str) -> tuple[dict[int, str], dict[str, str]]:
    names: dict[int, str] = {}
    parents: dict[str, str] = {}
    for number, row in enumerate(rows):
        place = f"{where}: categories[{number}]"
        found, name = _get(row, "id", (int,), place), " ".join(_get(row, "name", (str,), place).split())
        if not name or found in names or name in names.values():
            raise UserError(f"{place}: id {found}, name {name!r}: empty, or another has it already: correct the file")
        names[found] = name
        parent = " ".join(str(row.get("supercategory") or "").split())
        if parent and parent != name:
            parents[name] = parent
    return names, parents


def _images(
    rows: Sequence[Mapping[str, Any]], licenses: Sequence[Any], names: Mapping[int, str], where: str, prefix: str
) -> dict[int | str, _Image]:
    """Id -> image, without annotations."""
    terms = {
        row["id"]: str(row.get("url") or row.get("name") or "")
        for row in licenses
        if isinstance(row, dict) and type(row.get("id")) is int
    }
    images: dict[int | str, _Image] = {}
    keys: dict[str, int | str] = {}
    for number, row in enumerate(rows):
        place = f"{where}: images[{number}]"
        found, file_name = _get(row, "id", (int, str), place), _get(row, "file_name", (str,), place)
        width, height = (_get(row, side, (int,), place) for side in ("width", "height"))
        if not (0 < width <= LONGEST_SIDE and 0 < height <= LONGEST_SIDE):
            raise UserError(f"{place}: is {width}x{height} pixels large: each side must be 1 to {LONGEST_SIDE}")
        file_name = file_name.removeprefix("./")
        if not FILE_NAME.fullmatch(file_name):
            raise UserError(f"{place}: the file_name {file_name[:80]!r} does not stay below --images: correct the file")
        key = sample_key(found, prefix)
        if key in keys:
            raise UserError(f"{place}: its id {found!r} and the id {keys[key]!r} are the same: correct the file")
        keys[key] = found
        url = row.get("flickr_url") or row.get("coco_url") or ""
        license_id = row.get("license")
        metadata = Metadata(
            license=terms.get(license_id, "") if type(license_id) is int else "",
            original_url=str(url),
            title=file_name,
        )
        absent = None if "neg_category_ids" not in row else _named(row["neg_category_ids"], names)
        uncertain = _named(row.get("not_exhaustive_category_ids"), names)
        images[found] = _Image(key, found, file_name, width, height, metadata, absent, uncertain, [])
    return images


def _named(ids: Any, names: Mapping[int, str]) -> tuple[str, ...]:
    return (
        tuple(names[found] for found in ids if type(found) is int and found in names) if isinstance(ids, list) else ()
    )


def _assign(
    rows: Iterable[dict[str, Any]], images: Mapping[int | str, _Image], names: Mapping[int, str], where: str
) -> None:
    """Give each image its annotations, in the file's order; those that are of no use are counted in the log."""
    homeless = shapeless = 0
    for number, row in enumerate(rows):
        place = f"{where}: annotations[{number}]"
        image = images.get(_get(row, "image_id", (int, str), place))
        category = _get(row, "category_id", (int,), place)
        if category not in names:
            raise UserError(f"{place}: there is no category {category}: correct the file")
        if image is None:
            homeless += 1
        elif not row.get("segmentation") and not any(_box(row.get("bbox"), image)):
            shapeless += 1
        else:
            image.annotations.append((number, row))
    if homeless:
        logger.warning("%s: %s of images that it does not list: left out", where, counted(homeless, "annotation"))
    if shapeless:
        told = counted(shapeless, "annotation")
        logger.warning("%s: %s with neither a mask nor a box of any extent: left out", where, told)


def sample_key(image_id: int | str, prefix: str = "") -> str:
    """The key of a sample, from the id of an image: the same for the same, and different ones for different ids.

    Numbers are padded to 12 digits; whatever cannot be a key becomes what can of it, and a hash.
    """
    text = f"{image_id:012d}" if isinstance(image_id, int) else image_id
    if KEY.fullmatch(prefix + text):
        return prefix + text
    safe = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:40] or "image"
    return f"{prefix}{safe}-{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"


def parse_places(texts: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], bool]:
    """`--annotations` of COCO: one file, or `train=URL val=URL test=URL`; (split, URL) pairs, and whether it was named.

    Raises:
        UserError: neither.
    """
    named = [re.fullmatch(r"(train|val|test)=(.+)", text) for text in texts]
    found = [(match[1], match[2]) for match in named if match]
    if len(texts) == 1 and not found:
        return (("train", texts[0]),), False
    if len(found) != len(texts) or len(dict(found)) != len(found):
        raise UserError(
            f"--annotations {' '.join(texts)[:200]}: give one file, or one a split as train=URL val=URL test=URL"
        )
    return tuple(found), True
