"""Masks in PNGs as a source: a folder of images, and for each one a PNG that numbers its objects, or one per object.

The layouts, in which the path of an image without its extension is `<image>`:

- `<masks>/<image>.png` or `<masks>/<image>_mask.png`: each value but 0 is an object (PennFudan);
- `<masks>/<image>/<anything>.png`: pixels that are not 0 are an object;
- `<images>/<image>/images/<file>` and `<images>/<image>/masks/<anything>.png`: the same (Data Science Bowl 2018);
- a CSV table with a line per object, as `maskstream export --to folder` writes it.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from builder.fetching.fetch import Refusal, Request, fetch, fetch_one
from builder.sources.base import FILE_NAME, FLAGS, has_extent
from builder.sources.listing import ListedImage, ListedObject, ListedSource, Listing, files_under, sample_key
from builder.tasks.plan import Box, InlineMask, Metadata, Size
from shards.common.errors import UserError
from shards.common.text import counted, shown
from shards.format import rle
from shards.format.image import ImageError, image_size, pillow_errors
from shards.storage.location import Location

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
AT_ONCE = 64  # masks that are in memory as files
MAX_PIXELS = 64 << 20  # of a mask
MOST_OBJECTS = 4096  # in one PNG; more values are those of a photograph
TINY = 2  # pixels
SMOOTH = f"of {TINY} pixels or fewer: were they saved with smooth edges, or as a JPEG first?"

logger = logging.getLogger(__name__)

Objects = dict[str, tuple[Size, list[ListedObject]]]  # by image: the size of its masks, and its objects


@dataclass(frozen=True)
class MaskImages(ListedSource):
    """A folder of images and a folder of PNG masks, or a table of them, per split; `class_name` is that of all objects.

    A table has a column with the class of each object; then `class_name` is "".
    """

    class_name: str = ""

    @property
    def name(self) -> str:
        """The name of the source in `dataset.json`."""
        return "mask images"

    @property
    def image_layout(self) -> str:
        """Where the images are under their root, for messages."""
        return "<root>/<image>.<extension>, with masks at --annotations"

    def _read(self, split: str, location: Location, prefix: str) -> Listing:
        root, is_table = self.root_of(split), location.url.endswith(".csv")
        if is_table and self.class_name:
            raise UserError(f"{location}: the table has a class for each object: omit --class-name")
        if not is_table and not self.class_name:
            raise UserError(f"{location}: masks have no class names: give that of the objects, --class-name NAME")
        images = _image_files(root, location)
        if is_table:
            objects, names = _read_table(location, root, images)
            masks = {f"{_folder(location).path}/{one.mask_path}" for _, found in objects.values() for one in found}
            images = {name: path for name, path in images.items() if f"{root.path}/{path}" not in masks}
        else:
            places = _match(location, images, images.values() if location == root else ())
            objects, names = _read_masks(location, places, self.class_name), (self.class_name,)
        if not objects:
            raise UserError(
                f"{location}: no image of {root} has a mask there: masks must be at <image>.png, <image>_mask.png, "
                "<image>/<anything>.png, or next to the images in <image>/masks/"
            )
        if missing := len(images) - len(objects):
            logger.info("%s: %s without a mask: background", location, counted(missing, "image"))
        listed = (
            ListedImage(
                key=sample_key(image, prefix),
                id=image,
                file_name=file_name,
                size=objects[image][0] if image in objects else None,
                metadata=Metadata(title=file_name),
                objects=objects[image][1] if image in objects else (),
            )
            for image, file_name in images.items()
        )
        return Listing(names, {image.key: image for image in listed})


def _image_files(root: Location, masks: Location) -> dict[str, str]:
    """Return the file of each image, relative to the root; UserError if there are none, or two of the same name."""
    images: dict[str, str] = {}
    for path in files_under(root):
        file = PurePosixPath(path)
        if root == masks:
            is_mask = file.parent.name == "masks" or file.stem.endswith("_mask")
        else:
            is_mask = f"{root.path}/{path}".startswith(f"{masks.path}/")
        if file.suffix.lower() not in IMAGES or is_mask:
            continue
        if not FILE_NAME.fullmatch(path):
            raise UserError(f"{root}: the name {shown(path)} has a backslash or a control character: rename the file")
        image = _without(file.parent, "images") or str(file.with_suffix(""))
        if image in images:
            raise UserError(f"{root}: {images[image]} and {path} are both the image {image}: keep one of them")
        images[image] = path
    if not images:
        raise UserError(f"{root}: there is no image ({', '.join(IMAGES)}) in this folder: check --images")
    return images


def _without(folder: PurePosixPath, last: str) -> str:
    """Return the folder that has a folder of a name; "" if it is another one, or has no parent."""
    return str(folder.parent) if folder.name == last and folder.parent.name else ""


class _Place(NamedTuple):
    """A PNG of masks: its path, its image, and whether its values number objects (else all of it is one)."""

    path: str
    image: str
    numbered: bool


def _match(root: Location, images: Mapping[str, str], taken: Collection[str]) -> list[_Place]:
    """Return the masks of the images; `taken` are files that are images themselves. Others are named in a warning."""
    places, others = [], []
    paths = files_under(root)
    if not paths:
        raise UserError(f"{root}: there is no file in this folder: check --annotations")
    for path in paths:
        file = PurePosixPath(path)
        stem = str(file.with_suffix(""))
        whole = next((one for one in (stem, stem.removesuffix("_mask")) if one in images), "")
        folder = _without(file.parent, "masks") or str(file.parent)
        if path in taken:
            continue
        if file.suffix.lower() == ".png" and (whole or folder in images):
            places.append(_Place(path, whole or folder, bool(whole)))
        else:
            others.append(path)
    if others:
        what = f"{counted(len(others), 'file')} left out, such as {others[0][:80]}"
        logger.warning("%s: %s: not a PNG, or of no image of --images", root, what)
    return places


def _read_masks(root: Location, places: Sequence[_Place], label: str) -> Objects:
    """Return the objects of the images that have masks."""
    objects: Objects = {}
    empty = tiny = 0
    contents = _contents([root / place.path for place in places])
    for (path, image, numbered), data in zip(places, contents, strict=True):
        where = str(root / path)
        pixels = mask_values(data, where, numbered=numbered)
        masks = objects_in(pixels if numbered else pixels != 0)
        if len(masks) > MOST_OBJECTS:
            raise UserError(f"{where}: has {len(masks)} values: is it a photograph? check --annotations")
        found = _objects_of(objects, image, pixels, where)
        for value, mask in masks.items():
            name, number = (f"{path}#{value}", str(value)) if numbered else (path, "")
            found.append(_object(label, mask, name, number))
            tiny += rle.area(mask) <= TINY
        empty += not masks
    for count, what in ((empty, "without a pixel that is not 0: no object"), (tiny, SMOOTH)):
        if count:
            logger.warning("%s: %s %s", root, counted(count, "mask"), what)
    return objects


def objects_in(pixels: NDArray[Any]) -> dict[int, rle.Rle]:
    """Return the mask of each value but 0 of an array [H, W], by ascending value."""
    height, width = pixels.shape
    places = np.flatnonzero(pixels)
    values = pixels.ravel()[places]
    order = np.argsort(values, kind="stable")
    places, values = places[order], values[order]
    found: dict[int, rle.Rle] = {}
    for own in np.split(places, 1 + np.flatnonzero(values[1:] != values[:-1])):
        if len(own):
            y, x = np.divmod(own, width)
            bits = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1), np.uint8)
            bits[y - y.min(), x - x.min()] = 1
            found[int(pixels.flat[own[0]])] = rle.encode_part(bits, int(x.min()), int(y.min()), height, width)
    return found


def _objects_of(objects: Objects, image: str, pixels: NDArray[Any], where: str) -> list[ListedObject]:
    """Return the list of the objects of an image; UserError if its masks have several sizes."""
    size = (pixels.shape[1], pixels.shape[0])
    stated, found = objects.setdefault(image, (size, []))
    if size != stated:
        one, other = ("x".join(map(str, each)) for each in (size, stated))
        raise UserError(f"{where}: the mask is {one}, another one of the same image {other}: correct it")
    return found


def _read_table(location: Location, root: Location, images: Mapping[str, str]) -> tuple[Objects, tuple[str, ...]]:
    """Return the objects of the images that a table lists, and the names of its classes."""
    folder, rows = _folder(location), _rows(location, images)
    contents = _contents([folder / row["mask"] for _, row in rows if row["mask"]])
    objects: Objects = {}
    for place, row in rows:
        image, path, label = row["image"], row["mask"], row["class"]
        flags = tuple(flag for flag in FLAGS.values() if row.get(flag) == "1")
        if path:
            pixels = mask_values(next(contents), str(folder / path), numbered=False)
            found = _objects_of(objects, image, pixels, str(folder / path))
            if (mask := objects_in(pixels != 0).get(1)) is None:
                raise UserError(f"{place}: the mask {path} has no pixel that is not 0: correct it")
            found.append(_object(label, mask, path, "", _box(row, objects[image][0], place), flags))
            continue
        if image not in objects:
            objects[image] = (_size_of(root / images[image]), [])
        if (box := _box(row, objects[image][0], place)) is None:
            raise UserError(f"{place}: has neither a mask nor a box: give a mask, or x, y, width, height")
        if not has_extent(box):
            raise UserError(f"{place}: the box has no extent inside of the image: correct it")
        objects[image][1].append(ListedObject(label, box, flags=flags))
    return objects, tuple(sorted({row["class"] for _, row in rows}))


def _rows(location: Location, images: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
    """Return the lines of a table, each with its place for messages; UserError for values that cannot be right."""
    text = fetch_one(Request(location)).decode("utf-8-sig", "replace")
    table = csv.DictReader(io.StringIO(text, newline=""))
    try:
        rows = [(f"{location}: line {number}", row) for number, row in enumerate(table, start=2)]
    except csv.Error as error:
        raise UserError(f"{location}: not a CSV table ({error}): check --annotations") from error
    for column in ("image", "class", "mask"):
        if column not in (table.fieldnames or ()):
            raise UserError(f"{location}: has no column {column!r}: give a table with image, class and mask")
    for place, row in rows:
        if row["image"] not in images:
            raise UserError(f"{place}: --images has no image {shown(row['image'])}: correct the table")
        row["class"] = " ".join((row["class"] or "").split())
        if not row["class"]:
            raise UserError(f"{place}: has no class: correct the table")
        if row["mask"] and not FILE_NAME.fullmatch(row["mask"]):
            raise UserError(
                f"{place}: the mask {shown(row['mask'])} is not a path under {_folder(location)}: correct the table"
            )
        for flag in FLAGS.values():
            if row.get(flag) not in (None, "", "0", "1"):
                raise UserError(f"{place}: {flag} is {shown(row[flag])}: give 0 or 1")
    return rows


def _folder(file: Location) -> Location:
    return Location(file.url.rpartition("/")[0] or ".", file.anonymous)


def _object(
    label: str, mask: rle.Rle, path: str, number: str = "", box: Box | None = None, flags: tuple[str, ...] = ()
) -> ListedObject:
    """Return an object of a mask with at least one pixel."""
    x, y, w, h = rle.bounds(mask)
    tight = (x / mask.width, (x + w) / mask.width, y / mask.height, (y + h) / mask.height)
    place = InlineMask(mask.width, mask.height, json.dumps(mask.to_json()))
    return ListedObject(label, box or tight, place, path, number, flags=flags)


def mask_values(data: bytes, where: str, *, numbered: bool) -> NDArray[Any]:
    """Decode a PNG to numbers [H, W]; 0 is the background.

    `numbered` keeps the indices of a palette; otherwise its colours decide what is background. Colours are combined to
    one number, and an alpha channel is ignored. A UserError names the file if it is no PNG, or damaged.
    """
    try:
        with pillow_errors("a PNG"), Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS}")
            keeps = image.mode in ("1", "L", "I", "I;16", "RGB") or (numbered and image.mode == "P")
            pixels = np.asarray(image if keeps else image.convert("RGB"))
    except ImageError as error:
        raise UserError(f"{where}: cannot be read as a mask ({error}): give PNGs, or remove it") from error
    return pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1]) if pixels.ndim == 3 else pixels


def _contents(locations: Sequence[Location]) -> Iterator[bytes]:
    """Yield the contents of files, of which a few are in memory; UserError for one that is missing or refused."""
    for start in range(0, len(locations), AT_ONCE):
        part = locations[start : start + AT_ONCE]
        for location, data in zip(part, fetch([Request(one) for one in part]), strict=True):
            if isinstance(data, Refusal):
                raise UserError(f"{location}: the mask cannot be read ({data.reason}): check --annotations")
            yield data


def _size_of(location: Location) -> Size:
    try:
        return image_size(fetch_one(Request(location)), decode=False)
    except ImageError as error:
        raise UserError(f"{location}: its size is needed for boxes, and it cannot be read: {error}") from error


def _box(row: Mapping[str, str], size: Size, place: str) -> Box | None:
    """Return the box of a line in fractions; None if it has none."""
    texts = [row.get(name) or "" for name in ("x", "y", "width", "height")]
    if not any(texts):
        return None
    try:
        x, y, w, h = map(float, texts)
        if not all(abs(value) < 1 << 20 for value in (x, y, w, h)):  # false for NaN
            raise ValueError
    except ValueError:
        raise UserError(f"{place}: the box {shown(' '.join(texts))} is not x, y, width, height in pixels") from None
    width, height = size
    return x / width, (x + w) / width, y / height, (y + h) / height
