"""The annotation tables of one source split: read, filtered, and mask rows joined to box rows.

Coordinates are fractions of the image's width and height, in the order (x1, x2, y1, y2) of the tables.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from builder import openimages
from builder.classes import Classes
from builder.openimages import OpenImages
from builder.tables import read_table
from shards.sample import KEY

# The two tables write one box as different text (0.185 and 0.185000, six digits); 1e-5 would bridge that. Boxes that
# were redrawn between releases differ a little more. 0.01 is 10 pixels of an image's 1024: two objects of one class
# that close on all four sides can hardly be told apart, and the nearest is taken first.
JOIN_TOLERANCE = 0.01
JOIN_BLOCK = 1 << 16  # mask rows compared at a time, which bounds the memory for pairs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object of an image: a row of the box table, of the mask table, or of both.

    Attributes:
        category_id: the chosen class that owns its label.
        label: the source's label, a MID.
        box: (x1, x2, y1, y2) as fractions of the image, as the source has them.
        mask_path: the name of its mask in the source's zip; "" without a mask.
        box_id: the source's BoxID; "" without a mask, since only the mask table has it.
        predicted_iou: the source's estimate of the mask's quality; None without one.
    """

    category_id: int
    label: str
    box: tuple[float, float, float, float]
    mask_path: str = ""
    box_id: str = ""
    predicted_iou: float | None = None
    is_group_of: bool = False
    is_occluded: bool = False
    is_truncated: bool = False
    is_depiction: bool = False
    is_inside: bool = False


@dataclass(frozen=True, slots=True)
class Metadata:
    """What is known of an image beside its objects; the fields of `shards.sample.Sample`."""

    rotation: int = 0
    license: str = ""
    author: str = ""
    author_url: str = ""
    original_url: str = ""
    title: str = ""


@dataclass(frozen=True)
class SplitTables:
    """Mask and box rows of the chosen classes in one source split (columns `MASK_COLUMNS` and `BOX_COLUMNS`)."""

    masks: pa.Table
    boxes: pa.Table


def read_split(source: OpenImages, split: str, classes: Classes) -> SplitTables:
    """Read the mask rows of the chosen classes, and the box rows of the images that these can choose.

    Raises:
        UserError: a table is not what it should be.
        StorageError: a table cannot be had.
    """
    labels = pa.array(sorted(classes.owners), pa.string())
    masks = read_table(source.masks(split), openimages.MASK_COLUMNS, {"LabelName": labels})
    masks = _with_safe_keys(masks, str(source.masks(split)))
    where = {"LabelName": labels}
    if set(_owners(masks, classes)) == set(classes.kinds):
        # Every class has masks, so an image without any cannot be chosen: most of the table is never held.
        where["ImageID"] = pc.unique(masks["ImageID"].combine_chunks())
    boxes = read_table(source.boxes(split), openimages.BOX_COLUMNS, where)
    boxes = _with_safe_keys(boxes, str(source.boxes(split)))
    return SplitTables(_distinct(masks, ["MaskPath"]), _distinct(_usable(boxes, str(source.boxes(split))), _BOX_KEY))


def images_by_class(tables: SplitTables, classes: Classes) -> dict[int, list[str]]:
    """Category id -> images that count for it: those with a mask of it; for a class without any mask, with a box."""
    found: dict[int, list[str]] = {}
    of_masks, of_boxes = _owners(tables.masks, classes), _owners(tables.boxes, classes)
    for category in classes.categories:
        images = tables.masks["ImageID"].filter(pa.array(of_masks == category.id))
        if not len(images):
            images = tables.boxes["ImageID"].filter(pa.array(of_boxes == category.id))
        found[category.id] = sorted(pc.unique(images).to_pylist())
    return found


def annotate(tables: SplitTables, classes: Classes, image_ids: Collection[str]) -> dict[str, tuple[Annotation, ...]]:
    """Every annotation of the given images: box rows in the table's order, then masks that have no box row."""
    wanted = pa.array(sorted(image_ids), pa.string())
    masks = tables.masks.filter(pc.is_in(tables.masks["ImageID"], value_set=wanted))
    boxes = tables.boxes.filter(pc.is_in(tables.boxes["ImageID"], value_set=wanted))
    mask_groups, box_groups = _groups(masks, boxes)
    box_of_mask = match_boxes(
        mask_groups,
        _coordinates(masks, openimages.MASK_COORDINATES),
        box_groups,
        _coordinates(boxes, openimages.BOX_COORDINATES),
    )
    mask_rows, box_rows = masks.to_pylist(), boxes.to_pylist()
    mask_of_box = {int(box): mask_rows[mask] for mask, box in enumerate(box_of_mask) if box >= 0}
    found: dict[str, list[Annotation]] = {image_id: [] for image_id in image_ids}
    for number, row in enumerate(box_rows):
        found[row["ImageID"]].append(_annotation(row, mask_of_box.get(number), classes))
    for number, row in enumerate(mask_rows):
        if box_of_mask[number] < 0:
            found[row["ImageID"]].append(_annotation(None, row, classes))
    return {image_id: tuple(objects) for image_id, objects in found.items()}


def match_boxes(
    mask_groups: NDArray[np.int64],
    mask_boxes: NDArray[np.float64],
    box_groups: NDArray[np.int64],
    box_boxes: NDArray[np.float64],
    tolerance: float = JOIN_TOLERANCE,
) -> NDArray[np.int64]:
    """Give each mask the nearest box of its group, one to one, the nearest pairs first.

    Args:
        mask_groups: (M,) which rows may meet: a number for each (image, label).
        mask_boxes: (M, 4) coordinates.
        box_groups: (B,) like `mask_groups`.
        box_boxes: (B, 4) coordinates.
        tolerance: the largest difference in any coordinate.

    Returns:
        (M,) the row of each mask's box, or -1 where no box that is left lies within the tolerance.
    """
    order = np.argsort(box_groups, kind="stable")
    sorted_groups = box_groups[order]
    first = np.searchsorted(sorted_groups, mask_groups, "left")
    count = np.searchsorted(sorted_groups, mask_groups, "right") - first
    near: list[tuple[NDArray, NDArray, NDArray]] = []
    for start in range(0, len(mask_groups), JOIN_BLOCK):
        block = slice(start, start + JOIN_BLOCK)
        mask = np.repeat(np.arange(start, start + len(count[block])), count[block])
        ends = np.cumsum(count[block])
        within = np.arange(len(mask)) - np.repeat(ends - count[block], count[block])
        box = order[first[mask] + within]
        distance = np.abs(mask_boxes[mask] - box_boxes[box]).max(axis=1, initial=0.0)
        close = distance <= tolerance  # false for NaN
        near.append((distance[close], mask[close], box[close]))
    result = np.full(len(mask_groups), -1, dtype=np.int64)
    if not near:
        return result
    distance, mask, box = (np.concatenate(parts) for parts in zip(*near))
    taken: set[int] = set()
    for pair in np.lexsort((box, mask, distance)):
        if result[mask[pair]] < 0 and int(box[pair]) not in taken:
            result[mask[pair]] = box[pair]
            taken.add(int(box[pair]))
    return result


def read_verified(
    source: OpenImages, split: str, classes: Classes, image_ids: Collection[str]
) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Image -> the labels that people verified as present, and as absent; images without any are left out."""
    labels = pa.array(classes.verifiable, pa.string())
    where = {"LabelName": labels, "ImageID": pa.array(sorted(image_ids), pa.string())}
    table = read_table(source.labels(split), openimages.LABEL_COLUMNS, where)
    present: dict[str, set[str]] = defaultdict(set)
    absent: dict[str, set[str]] = defaultdict(set)
    for row in table.to_pylist():
        verdict = {1.0: present, 0.0: absent}.get(row["Confidence"])
        if verdict is not None:  # between the two lies a machine's guess, not a verification
            verdict[row["ImageID"]].add(row["LabelName"])
    return {image: (frozenset(present[image]), frozenset(absent[image])) for image in {*present, *absent}}


def read_metadata(source: OpenImages, split: str, image_ids: Collection[str]) -> dict[str, Metadata]:
    """Image -> licence, author, URL and rotation; images that the table does not list are left out."""
    where = {"ImageID": pa.array(sorted(image_ids), pa.string())}
    table = read_table(source.metadata(split), openimages.METADATA_COLUMNS, where, newlines_in_values=True)
    return {row["ImageID"]: _metadata(row) for row in reversed(table.to_pylist())}  # the first of a repeated row


def _metadata(row: Mapping) -> Metadata:
    return Metadata(
        rotation=int(row["Rotation"] or 0) % 360,
        license=row["License"],
        author=row["Author"],
        author_url=row["AuthorProfileURL"],
        original_url=row["OriginalURL"],
        title=row["Title"],
    )


def _annotation(box: Mapping | None, mask: Mapping | None, classes: Classes) -> Annotation:
    row = box if box is not None else mask
    assert row is not None
    names = openimages.BOX_COORDINATES if box is not None else openimages.MASK_COORDINATES
    # A mask row may lack its coordinates (null): a box without extent, which the packer takes from the mask itself.
    x1, x2, y1, y2 = (0.0 if row[name] is None or not np.isfinite(row[name]) else row[name] for name in names)
    flags = {name: box is not None and box[name] == 1 for name in openimages.BOX_FLAGS}
    iou = None if mask is None else mask["PredictedIoU"]
    return Annotation(
        category_id=classes.owners[row["LabelName"]],
        label=row["LabelName"],
        box=(x1, x2, y1, y2),
        mask_path="" if mask is None else mask["MaskPath"],
        box_id="" if mask is None else mask["BoxID"],
        predicted_iou=iou if iou is not None and np.isfinite(iou) else None,
        is_group_of=flags["IsGroupOf"],
        is_occluded=flags["IsOccluded"],
        is_truncated=flags["IsTruncated"],
        is_depiction=flags["IsDepiction"],
        is_inside=flags["IsInside"],
    )


_BOX_KEY = ["ImageID", "LabelName", *openimages.BOX_COORDINATES]


def _owners(table: pa.Table, classes: Classes) -> NDArray[np.int64]:
    """(rows,) the category id of each row's label."""
    labels = sorted(classes.owners)
    position = pc.index_in(table["LabelName"], value_set=pa.array(labels, pa.string())).to_numpy()
    owners: NDArray[np.int64] = np.array([classes.owners[label] for label in labels], dtype=np.int64)[position]
    return owners


def _groups(masks: pa.Table, boxes: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the pairs (image, label) alike over both tables."""
    keys = [
        pc.binary_join_element_wise(table["ImageID"], table["LabelName"], " ").combine_chunks()
        for table in (masks, boxes)
    ]
    codes = np.asarray(pa.concat_arrays(keys).dictionary_encode().indices.to_numpy(), dtype=np.int64)
    return codes[: len(keys[0])], codes[len(keys[0]) :]


def _coordinates(table: pa.Table, names: Iterable[str]) -> NDArray[np.float64]:
    """(rows, 4) float64; null is NaN."""
    columns = [table[name].to_numpy().astype(np.float64) for name in names]
    return np.stack(columns, axis=1)


def _distinct(table: pa.Table, key: list[str]) -> pa.Table:
    """The first row of each key, in the table's order."""
    others = [name for name in table.column_names if name not in key]
    grouped = table.group_by(key, use_threads=False).aggregate([(name, "first") for name in others])
    return grouped.rename_columns([name.removesuffix("_first") for name in grouped.column_names]).select(
        table.column_names
    )


def _with_safe_keys(table: pa.Table, where: str) -> pa.Table:
    """Only rows whose ImageID can stand in a URL and key a sample."""
    kept = table.filter(pc.match_substring_regex(table["ImageID"], f"^(?:{KEY.pattern})$"))
    if kept.num_rows < table.num_rows:
        logger.warning("%s: %d rows have an impossible ImageID: left out", where, table.num_rows - kept.num_rows)
    return kept


def _usable(boxes: pa.Table, where: str) -> pa.Table:
    """Only rows whose box has an extent inside the image; the others cannot be boxes."""
    x1, x2, y1, y2 = np.clip(_coordinates(boxes, openimages.BOX_COORDINATES), 0.0, 1.0).T
    good = (x2 > x1) & (y2 > y1)  # false for NaN
    if not good.all():
        logger.warning("%s: %d boxes are empty, inverted or not numbers: left out", where, int((~good).sum()))
    return boxes.filter(pa.array(good))
