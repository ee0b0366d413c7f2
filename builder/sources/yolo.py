"""Ultralytics' YOLO layout as a source: `data.yaml`, folders of images, and a text file of objects per image.

Format: https://docs.ultralytics.com/datasets/segment/. A line of a label file is the number of a class and a polygon,
or the centre and size of a box, in fractions of the picture as its EXIF orientation turns it. The label file of
`images/train/a.jpg` is `labels/train/a.txt`; an image without one, or with an empty one, has no object.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from builder.fetching.fetch import Refusal, Request, fetch, fetch_one
from builder.sources.base import FILE_NAME, has_extent
from builder.sources.listing import ListedImage, ListedObject, ListedSource, Listing, files_under, sample_key
from builder.sources.mask_images import IMAGES
from builder.tasks.plan import FractionalPolygon, Metadata
from shards.common.errors import UserError
from shards.common.text import counted, one_line, shown
from shards.storage.location import Location

SPLITS = ("train", "val", "test")
AT_ONCE = 1024  # label files that are read together
OUTSIDE = 0.01  # of the picture's side by which a corner may be outside of it: numbers are rounded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Yolo(ListedSource):
    """A dataset in Ultralytics' layout; the file of every split is its `data.yaml`.

    Attributes:
        classes: names of the classes, by number.
        folders: folders and lists of images of each split, relative to the root.
    """

    classes: tuple[str, ...] = ()
    folders: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def open(cls, location: Location, root: Location | None) -> Yolo:
        """Read a `data.yaml`; `root`, unless None, is the folder that its paths are relative to."""
        value = _read_yaml(location)
        names = _names(value, location)
        if root is None:
            here = Location(location.url.rpartition("/")[0] or ".", location.anonymous)
            root = _under(here, value.get("path") or "")
        folders = {split: _paths(value[split], f"{location}: {split}") for split in SPLITS if value.get(split)}
        if not folders:
            raise UserError(f"{location}: names no images: give train, val or test, such as train: images/train")
        if "kpt_shape" in value:
            raise UserError(f"{location}: has labels of key points (kpt_shape): give a dataset of polygons or boxes")
        files = tuple((split, location) for split in folders)
        return cls(root, files, len(files) > 1, classes=names, folders=tuple(folders.items()))

    @property
    def name(self) -> str:
        """The name of the source in `dataset.json`."""
        return "YOLO"

    @property
    def image_layout(self) -> str:
        """Where the images are under their root, for messages."""
        return "<root>/images/<split>/<image>, as data.yaml says"

    def _read(self, split: str, location: Location, prefix: str) -> Listing:
        names: dict[str, str] = {}  # by path
        for place in dict(self.folders)[split]:
            names |= {path: _name(path, place) for path in _images(self.images, place, location)}
        shared = Counter(names.values())
        labels = [str(PurePosixPath(_label_folder(path)).with_suffix(".txt")) for path in names]
        texts = _texts([self.images / label for label in labels])
        images: dict[str, ListedImage] = {}
        empty = 0
        for (path, name), label, text in zip(names.items(), labels, texts, strict=True):
            key = sample_key(name if shared[name] == 1 else path, prefix)
            found = list(_objects(text, self.classes, str(self.images / label)))
            objects = [one for one in found if one.mask is not None or has_extent(one.box)]
            empty += len(found) - len(objects)
            images[key] = ListedImage(key, name, path, None, Metadata(title=path), objects)
        if not any(image.objects for image in images.values()):
            raise UserError(
                f"{self.images}: no image of {split} has a label, such as {labels[0]}: labels must be in labels/, as "
                f"the images are in images/ (or remove {split} from {location})"
            )
        if empty:
            logger.warning(
                "%s: %s of %s without any extent: left out", self.images, counted(empty, "box", "boxes"), split
            )
        return Listing(self.classes, images)


def _read_yaml(location: Location) -> dict[str, Any]:
    try:
        value = yaml.safe_load(fetch_one(Request(location)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{location}: not YAML ({one_line(error)[:120]}): --annotations takes a data.yaml") from error
    if not isinstance(value, dict):
        raise UserError(f"{location}: is not a data.yaml with train, val and names: check --annotations")
    return value


def _names(value: Mapping[str, Any], location: Location) -> tuple[str, ...]:
    found = value.get("names")
    if isinstance(found, dict) and found.keys() == set(range(len(found))):
        found = [found[number] for number in range(len(found))]
    if not isinstance(found, list) or not found or not all(isinstance(name, str) and name.strip() for name in found):
        raise UserError(f"{location}: names is {shown(found)}: give a name for each class from 0")
    names = tuple(" ".join(name.split()) for name in found)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{location}: two classes are named {twice!r}: rename one of them")
    return names


def _paths(value: Any, place: str) -> tuple[str, ...]:
    """Return the folders or lists of a split, relative to the root."""
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in found):
        raise UserError(f"{place} is {shown(value)}: give a folder of images, or a list of folders")
    # Ultralytics, too, finds the ../train/images of other tools without the dots.
    paths = tuple(one.replace("\\", "/").removeprefix("./").removeprefix("../").rstrip("/") for one in found)
    for path in paths:
        if not FILE_NAME.fullmatch(path):
            raise UserError(
                f"{place} is {shown(path)}, which is not under the dataset's folder: write it relative to path, or "
                "give --images ROOT"
            )
    return paths


def _under(folder: Location, path: Any) -> Location:
    """Return the place of a `path` in a data.yaml: a whole one, or one relative to the file."""
    if not isinstance(path, str):
        raise UserError(f"{folder}: path in data.yaml is {shown(path)}: give the folder of the dataset")
    if "://" in path or path.startswith("/"):
        return Location(path, folder.anonymous)
    return folder / path if path.strip("./") else folder


def _images(root: Location, place: str, location: Location) -> list[str]:
    """Return the images of a folder, or of a text file that lists them, relative to the root."""
    if place.endswith(".txt"):
        lines = fetch_one(Request(root / place)).decode("utf-8-sig", "replace").splitlines()
        paths = [line.strip().replace("\\", "/").removeprefix("./") for line in lines if line.strip()]
        for path in paths:
            if not FILE_NAME.fullmatch(path):
                raise UserError(f"{root / place}: {shown(path)} is not under {root}: write it relative to that folder")
    else:
        paths = [f"{place}/{path}" for path in files_under(root / place) if path.lower().endswith(IMAGES)]
    if not paths:
        raise UserError(
            f"{root / place}: there is no image in it, and {location} names it: check path and --images, or remove it"
        )
    return paths


def _label_folder(path: str) -> str:
    """Return the path of an image with the last folder `images` as `labels`, as Ultralytics does."""
    before, found, after = f"/{path}".rpartition("/images/")
    return f"{before}/labels/{after}".lstrip("/") if found else path


def _name(path: str, place: str) -> str:
    """Return the path of an image without its extension, relative to its folder or, from a list, to `images/`."""
    inner = path.removeprefix(f"{place}/") if path.startswith(f"{place}/") else path.rpartition("images/")[2]
    return str(PurePosixPath(inner).with_suffix(""))


def _texts(locations: list[Location]) -> Iterator[str]:
    """Yield the contents of label files, "" for one that is missing."""
    for start in range(0, len(locations), AT_ONCE):
        part = locations[start : start + AT_ONCE]
        for location, data in zip(part, fetch([Request(one) for one in part]), strict=True):
            if isinstance(data, Refusal) and data.reason != "missing":
                raise UserError(f"{location}: the labels cannot be read ({data.reason}): check --annotations")
            yield "" if isinstance(data, Refusal) else data.decode("utf-8-sig", "replace")


def _objects(text: str, names: tuple[str, ...], where: str) -> Iterator[ListedObject]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{where}: line {number}"
        try:
            category, *values = map(float, line.split())
        except ValueError:
            raise UserError(f"{place}: {shown(line)} is not a class and numbers: correct it") from None
        if not (category.is_integer() and 0 <= category < len(names)):
            raise UserError(
                f"{place}: class {category:g} is not one of {counted(len(names), 'name')} from 0: correct it"
            )
        if not all(-OUTSIDE <= value <= 1 + OUTSIDE for value in values):  # false for NaN
            raise UserError(
                f"{place}: {shown(line)} has numbers that are not fractions of the image, 0 to 1: correct it"
            )
        yield _object(names[int(category)], values, place, f"line {number}")


def _object(label: str, values: list[float], place: str, row: str) -> ListedObject:
    """Return a box (four numbers) or a polygon (six or more)."""
    if len(values) == 4:
        x, y, w, h = values
        return ListedObject(label, (x - w / 2, x + w / 2, y - h / 2, y + h / 2))
    if len(values) < 6 or len(values) % 2:
        raise UserError(f"{place}: has {counted(len(values), 'number')}: a box has 4, a polygon 6 or more, in pairs")
    box = (min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2]))
    return ListedObject(label, box, FractionalPolygon(json.dumps(values)), row)
