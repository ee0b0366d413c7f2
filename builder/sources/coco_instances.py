"""Instances files in COCO's JSON format: parsed, checked, and each image with its annotations.

Format: https://cocodataset.org/#format-data. Also read where present: `neg_category_ids` and
`not_exhaustive_category_ids` of LVIS (https://www.lvisdataset.org/dataset), `predicted_iou` as in SA-1B, and
`mask_source`, `mask_score` and `mask_run` of `maskstream export`.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from builder.sources.base import FAR, FILE_NAME, has_extent
from builder.sources.coco_categories import CocoCategory, arrange
from builder.sources.listing import ListedImage, ListedObject, Listing, sample_key
from builder.tasks.plan import InlineMask, Metadata, Size
from shards.common.argument_checks import is_text
from shards.common.errors import UserError
from shards.common.text import counted
from shards.format.sample import PREDICTED, MaskPrediction

LONGEST_SIDE = 1 << 16  # pixels

logger = logging.getLogger(__name__)


def parse_instances(data: bytes, where: str, prefix: str = "", *, lvis: bool = False) -> Listing:
    """Parse an instances file, at `where`, into images whose keys begin with `prefix`; UserError if it is damaged.

    With `lvis`, each image must have the lists of LVIS, and need not have a file name: then it is that of `coco_url`.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_hook=_compact)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({str(error)[:120]}): --annotations takes COCO instances files") from error
    for name in ("images", "annotations", "categories"):
        rows = value.get(name) if isinstance(value, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{where}: has no list {name!r} of objects: --annotations takes COCO instances files")
    if any("segments_info" in row for row in value["annotations"]):
        raise UserError(f"{where}: is a panoptic file (it has segments_info): give the instances file of the dataset")
    if lvis:
        _prepare_lvis(value["images"], where)
    names, parents = _categories(value["categories"], value["annotations"], where)
    licenses = value.get("licenses")
    images = _images(value["images"], licenses if isinstance(licenses, list) else [], names, where, prefix)
    _assign(value["annotations"], images, names, where)
    return Listing(tuple(names.values()), {image.key: image for image in images.values()}, parents)


def fractional_box(bbox: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """Return (x, y, w, h) in pixels as (x1, x2, y1, y2) in fractions of the image; all 0 for anything but a box."""
    nothing = (0.0, 0.0, 0.0, 0.0)
    if not isinstance(bbox, list) or len(bbox) != 4:
        return nothing
    if not all(type(value) in (int, float) and abs(value) <= 4 * LONGEST_SIDE for value in bbox):  # false for NaN
        return nothing
    x, y, w, h = bbox
    box = x / width, (x + w) / width, y / height, (y + h) / height
    return box if has_extent(box) and all(abs(value) <= FAR for value in box) else nothing


def _compact(value: dict[str, Any]) -> dict[str, Any]:
    """Replace a segmentation by its text during parsing, because its numbers take ten times the memory."""
    if "segmentation" in value:
        found = value["segmentation"]
        value["segmentation"] = json.dumps(found, separators=(",", ":")) if found else ""
    return value


def _get(row: Mapping[str, Any], key: str, kinds: tuple[type, ...], place: str) -> Any:
    """Return a required value of one of the types; a bool is not an int."""
    found = row.get(key)
    if type(found) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{place}: {key!r} is {str(found)[:60]!r}, not of type {wanted}: correct the file")
    return found


def _categories(
    rows: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], where: str
) -> tuple[dict[int, str], dict[str, str]]:
    """Return the names of the classes by id, and their supercategories by name."""
    found: dict[int, CocoCategory] = {}
    for number, row in enumerate(rows):
        place = f"{where}: categories[{number}]"
        category_id, name = _get(row, "id", (int,), place), " ".join(_get(row, "name", (str,), place).split())
        if not name or category_id in found:
            raise UserError(f"{place}: id {category_id}, name {name!r}: empty, or used before: correct the file")
        parent = " ".join(str(row.get("supercategory") or "").split())
        found[category_id] = CocoCategory(category_id, name, "" if parent.casefold() == "none" else parent)
    ids = (row.get("category_id") for row in annotations)
    return arrange(list(found.values()), {each for each in ids if type(each) is int}, where)


def _images(
    rows: Sequence[Mapping[str, Any]], licenses: Sequence[Any], names: Mapping[int, str], where: str, prefix: str
) -> dict[int | str, ListedImage]:
    """Return a dict from ids to images, without annotations."""
    terms = {
        row["id"]: str(row.get("url") or row.get("name") or "")
        for row in licenses
        if isinstance(row, dict) and type(row.get("id")) is int
    }
    images: dict[int | str, ListedImage] = {}
    ids: dict[str, int | str] = {}
    _note_names([str(row.get("file_name")) for row in rows], where)
    for number, row in enumerate(rows):
        place = f"{where}: images[{number}]"
        image = _image(row, terms, names, place, prefix)
        if image.key in ids:
            same = f"its id {image.id!r} and the id {ids[image.key]!r} are the same"
            raise UserError(f"{place}: {same}: correct the file")
        ids[image.key] = image.id
        images[image.id] = image
    return images


def _image(
    row: Mapping[str, Any], terms: Mapping[int, str], names: Mapping[int, str], place: str, prefix: str
) -> ListedImage:
    found = _get(row, "id", (int, str), place)
    if "file_name" not in row and "neg_category_ids" in row:
        raise UserError(f"{place}: has no file_name, as in LVIS: give --source lvis")
    file_name = _get(row, "file_name", (str,), place)
    width, height = (_get(row, side, (int,), place) for side in ("width", "height"))
    if not (0 < width <= LONGEST_SIDE and 0 < height <= LONGEST_SIDE):
        raise UserError(f"{place}: is {width}x{height} pixels large: each side must be 1 to {LONGEST_SIDE}")
    file_name = file_name.replace("\\", "/").removeprefix("./")  # as tools write it on Windows
    if re.match("[A-Za-z]:/", file_name):
        raise UserError(
            f"{place}: the file_name {file_name[:80]!r} is a whole path of Windows: write it as under --images"
        )
    if not FILE_NAME.fullmatch(file_name):
        raise UserError(f"{place}: the file_name {file_name[:80]!r} is not under --images: correct the file")
    license_id = row.get("license")
    metadata = Metadata(
        license=terms.get(license_id, "") if type(license_id) is int else "",
        original_url=str(row.get("flickr_url") or row.get("coco_url") or ""),
        title=file_name,
    )
    absent = _named(row["neg_category_ids"], names) if "neg_category_ids" in row else None
    present = _named(row["verified_present"], names) if "verified_present" in row else None  # as exports write it
    uncertain = _named(row.get("not_exhaustive_category_ids"), names)
    key, size = sample_key(found, prefix), (width, height)
    objects = _Annotations(names, size)
    return ListedImage(key, found, file_name, size, metadata, objects, absent, present, uncertain)


def _prepare_lvis(rows: Sequence[dict[str, Any]], where: str) -> None:
    """Give each image of an LVIS file a file name, `train2017/000000000139.jpg`; UserError for a file of COCO."""
    for number, row in enumerate(rows):
        for name in ("neg_category_ids", "not_exhaustive_category_ids"):
            if not isinstance(row.get(name), list):
                raise UserError(f"{where}: images[{number}] has no list {name!r}: give LVIS files, or --source coco")
        if "file_name" not in row:
            row["file_name"] = "/".join(_get(row, "coco_url", (str,), f"{where}: images[{number}]").split("/")[-2:])


def _note_names(names: Sequence[str], where: str) -> None:
    """Log how many names of files are read as something else."""
    if backslashes := sum("\\" in name for name in names):
        logger.info("%s: %s with backslashes, read as folders", where, counted(backslashes, "file name"))


def _named(ids: Any, names: Mapping[int, str]) -> tuple[str, ...]:
    ids = ids if isinstance(ids, list) else []
    return tuple(names[found] for found in ids if type(found) is int and found in names)


def _assign(
    rows: Iterable[dict[str, Any]], images: Mapping[int | str, ListedImage], names: Mapping[int, str], where: str
) -> None:
    """Add the annotations to their images, in the file's order; warn about those that are left out."""
    unlisted = empty = 0
    for number, row in enumerate(rows):
        place = f"{where}: annotations[{number}]"
        image = images.get(_get(row, "image_id", (int, str), place))
        category = _get(row, "category_id", (int,), place)
        if category not in names:
            raise UserError(f"{place}: there is no category {category}: correct the file")
        if image is None:
            unlisted += 1
            continue
        annotations = image.objects
        assert isinstance(annotations, _Annotations)
        if not row.get("segmentation") and not any(fractional_box(row.get("bbox"), *annotations.size)):
            empty += 1
        else:
            annotations.rows.append((number, row))
    if unlisted:
        logger.warning("%s: %s of images that it does not list: left out", where, counted(unlisted, "annotation"))
    if empty:
        found = counted(empty, "annotation")
        logger.warning("%s: %s with neither a mask nor a box of any extent: left out", where, found)


@dataclass(frozen=True, slots=True)
class _Annotations(Sequence[ListedObject]):
    """The annotations of an image of a size, which become objects when they are needed: a file has a million.

    `rows` are positions in the file and what is there, with `segmentation` as JSON text; `names` those of categories.
    """

    names: Mapping[int, str]
    size: Size
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> ListedObject: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[ListedObject]: ...

    def __getitem__(self, place: int | slice) -> ListedObject | Sequence[ListedObject]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        number, row = self.rows[place]
        segmentation: Any = row.get("segmentation")
        iou: Any = row.get("predicted_iou")
        area: Any = row.get("area")
        return ListedObject(
            label=self.names[row["category_id"]],
            box=fractional_box(row.get("bbox"), *self.size),
            mask=InlineMask(*self.size, segmentation) if segmentation else None,
            mask_path=f"annotations[{number}]" if segmentation else "",
            box_id=str(row.get("id", ""))[:64],
            predicted_iou=float(iou) if type(iou) in (int, float) and 0 <= iou <= 1 else None,
            area=float(area) if type(area) in (int, float) and 0 <= area < math.inf else None,
            prediction=_prediction(row),
            flags=("is_group_of",) if row.get("iscrowd") == 1 else (),
        )


def _prediction(row: dict[str, Any]) -> MaskPrediction | None:
    """Return what `maskstream export --to coco` says about a predicted mask; None for any other mask."""
    score: Any = row.get("mask_score")
    run: Any = row.get("mask_run")
    if row.get("mask_source") != PREDICTED or not row.get("segmentation"):
        return None
    is_score, is_name = type(score) in (int, float) and 0 <= score <= 1, isinstance(run, str) and run and is_text(run)
    return MaskPrediction(float(score) if is_score else 0.0, run if is_name else "unknown")
