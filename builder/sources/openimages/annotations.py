"""The annotation tables of one split of Open Images: read, filtered, and mask rows joined to box rows.

Coordinates are fractions of the image's width and height, in the order (x1, x2, y1, y2) of the tables. Nothing of a
table is kept between two calls: a cache (`builder.fetching.table_cache`) makes the second reading cheap.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from builder.fetching.fetch import Inventory
from builder.fetching.table_cache import Cache
from builder.fetching.zip_members import directory_is_cached, locate_members
from builder.sources.base import FLAGS, Filters
from builder.sources.csv_tables import leave_out, read_table, tell_left_out
from builder.sources.openimages import layout as openimages
from builder.sources.openimages.box_matching import match_boxes
from builder.sources.openimages.layout import Layout
from builder.sources.taxonomy import Classes
from builder.tasks.candidates import Candidates
from builder.tasks.plan import Annotation, Member, Metadata, PlannedImage, PlannedObject
from shards.common.text import counted
from shards.format.sample import KEY
from shards.storage.location import Location

MASK_NAME = r"[A-Za-z0-9_-]{1,120}\.png"
FAR = 2.0  # image lengths: a corner further away than this is no corner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitTables:
    """Mask and box rows of one source split (columns `MASK_COLUMNS` and `BOX_COLUMNS`)."""

    masks: pa.Table
    boxes: pa.Table


@dataclass(frozen=True)
class OpenImagesSplit:
    """One split of Open Images, as the chosen classes and the filters show it (a `builder.sources.base.SourceSplit`).

    Which version of a table or zip there is, is asked once (`inventory`), and no other is read.
    """

    layout: Layout
    name: str
    classes: Classes
    filters: Filters
    cache: Cache | None = None
    inventory: Inventory = field(default_factory=Inventory, compare=False, repr=False)

    def candidates(self) -> dict[int, Candidates]:
        """Id of each class that was asked for -> images with a mask of it, and with boxes only, that the filters leave.

        Where nothing but masks counts and no flag is filtered by, the box table is not read at all.
        """
        labels = pa.array(self.classes.wanted_labels, pa.string())
        needs_boxes = bool(self.filters.drop) or not self.filters.require_mask
        boxes = self._boxes({"LabelName": labels}) if needs_boxes else None
        masks = self._masks({"LabelName": labels})
        if boxes is not None and self.filters.drop:
            dropped = _flagged(boxes, self.filters.drop)
            of_box = np.append(dropped, False)  # the last is for a mask without a box, whose row is -1
            masks = masks.filter(pa.array(~of_box[join(SplitTables(masks, boxes))]))
            boxes = boxes.filter(pa.array(~dropped))
        masks = masks.filter(pc.fill_null(pc.greater_equal(_estimate(masks), self.filters.min_predicted_iou), True))
        with_mask = self._images_by_class(masks)
        with_box = {} if boxes is None else self._images_by_class(boxes)
        return {
            category.id: Candidates(
                masked=tuple(sorted(with_mask.get(category.id, ()))),
                boxed=tuple(sorted(with_box.get(category.id, set()) - with_mask.get(category.id, set()))),
            )
            for category in self.classes.wanted
        }

    def find(self, names: Collection[str]) -> dict[str, str]:
        """The ImageIDs that occur in the split's tables."""
        wanted = {"ImageID": pa.array(sorted(name for name in names if KEY.fullmatch(name)), pa.string())}
        tables = [self._metadata(wanted), self._boxes(wanted), self._masks(wanted)]
        return {image_id: image_id for table in tables for image_id in pc.unique(table["ImageID"]).to_pylist()}

    def describe(self, image_ids: Collection[str]) -> dict[str, PlannedImage]:
        """All that the tables and the zips' directories say of the images; each is read once."""
        where = {
            "LabelName": pa.array(sorted(self.classes.owners), pa.string()),
            "ImageID": pa.array(sorted(image_ids), pa.string()),
        }
        tables = SplitTables(
            _distinct(self._masks(where), ["MaskPath"], self.layout.masks(self.name)),
            _distinct(self._boxes(where), _BOX_KEY, self.layout.boxes(self.name)),
        )
        annotations = annotate(tables, self.classes, image_ids)
        # Three kinds of reads that wait for the network more than they work.
        with ThreadPoolExecutor(2) as pool:
            verified_read = pool.submit(self.verified, image_ids)
            metadata_read = pool.submit(self.metadata, image_ids)
            members = self._locate(annotations)
            verified, metadata = verified_read.result(), metadata_read.result()
        planned: dict[str, PlannedImage] = {}
        for image_id, found in annotations.items():
            objects = [PlannedObject(annotation, members.get(annotation.mask_path)) for annotation in found]
            present, absent = self.classes.verified(
                *verified.get(image_id, (frozenset(), frozenset())),
                annotated=frozenset(annotation.category_id for annotation in found),
            )
            planned[image_id] = PlannedImage(
                image_id=image_id,
                url=self.layout.image(self.name, image_id).url,
                objects=self.filters.apply(objects),
                verified_present=present,
                verified_absent=absent,
                metadata=metadata.get(image_id, Metadata()),
            )
        return planned

    def verified(self, image_ids: Collection[str]) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
        """Image -> the labels that people verified as present, and as absent; images without any are left out."""
        labels = pa.array(self.classes.verifiable, pa.string())
        where = {"LabelName": labels, "ImageID": pa.array(sorted(image_ids), pa.string())}
        table = self._table(self.layout.labels(self.name), openimages.LABEL_COLUMNS, where)
        present: dict[str, set[str]] = defaultdict(set)
        absent: dict[str, set[str]] = defaultdict(set)
        for row in table.to_pylist():
            verdict = {1.0: present, 0.0: absent}.get(row["Confidence"])
            if verdict is not None:  # between the two lies a machine's guess, not a verification
                verdict[row["ImageID"]].add(row["LabelName"])
        return {image: (frozenset(present[image]), frozenset(absent[image])) for image in {*present, *absent}}

    def metadata(self, image_ids: Collection[str]) -> dict[str, Metadata]:
        """Image -> licence, author, URL and rotation; images that the table does not list are left out."""
        table = self._metadata({"ImageID": pa.array(sorted(image_ids), pa.string())})
        return {row["ImageID"]: _metadata(row) for row in reversed(table.to_pylist())}  # the first of a repeated row

    def _metadata(self, where: Mapping[str, pa.Array]) -> pa.Table:
        return self._table(self.layout.metadata(self.name), openimages.METADATA_COLUMNS, where, newlines_in_values=True)

    def _masks(self, where: Mapping[str, pa.Array]) -> pa.Table:
        """Rows whose ImageID can key a sample and whose MaskPath can name a file in a zip."""
        location = self.layout.masks(self.name)
        masks = self._table(location, openimages.MASK_COLUMNS, where)
        masks = _with_safe(masks, "ImageID", KEY.pattern, location)
        return _with_safe(masks, "MaskPath", MASK_NAME, location)

    def _boxes(self, where: Mapping[str, pa.Array]) -> pa.Table:
        """Rows whose ImageID can key a sample and whose box has an extent inside the image."""
        location = self.layout.boxes(self.name)
        boxes = self._table(location, openimages.BOX_COLUMNS, where)
        return _usable(_with_safe(boxes, "ImageID", KEY.pattern, location), location)

    def _table(
        self,
        location: Location,
        columns: Mapping[str, str],
        where: Mapping[str, pa.Array],
        *,
        newlines_in_values: bool = False,
    ) -> pa.Table:
        cache, inventory = self.cache, self.inventory
        return read_table(
            location, columns, where, newlines_in_values=newlines_in_values, cache=cache, inventory=inventory
        )

    def _images_by_class(self, table: pa.Table) -> dict[int, set[str]]:
        owners = self.classes.owners
        pairs = table.group_by(["ImageID", "LabelName"]).aggregate([])
        found: dict[int, set[str]] = defaultdict(set)
        for label in pc.unique(pairs["LabelName"]).to_pylist():
            found[owners[label]].update(pairs["ImageID"].filter(pc.equal(pairs["LabelName"], label)).to_pylist())
        return found

    def _locate(self, annotations: Mapping[str, Iterable[Annotation]]) -> dict[str, Member]:
        """Mask path -> its place in a zip; masks that no zip holds are left out."""
        wanted: dict[str, list[str]] = {}
        for image_id, objects in annotations.items():
            paths = [annotation.mask_path for annotation in objects if annotation.mask_path]
            # The zips go by a hex digit; an ImageID that starts otherwise has no zip, and its masks are missing.
            if paths and image_id[0] in "0123456789abcdefABCDEF":
                wanted.setdefault(image_id[0].lower(), []).extend(paths)
        if not wanted:
            return {}
        cache = self.cache
        zips = {self.layout.mask_zip(self.name, digit): paths for digit, paths in sorted(wanted.items())}
        cached = sum(directory_is_cached(location, cache) for location in zips)
        masks, held = counted(sum(map(len, zips.values())), "mask"), counted(len(zips), "zip")
        logger.info("locating %s of %s in %s (directories cached: %d)", masks, self.name, held, cached)
        return locate_members(zips, cache=cache, inventory=self.inventory)


def join(tables: SplitTables) -> NDArray[np.int64]:
    """(masks,) the row of each mask's box, -1 where it has none: of the same image and label, and the nearest."""
    mask_groups, box_groups = _groups(tables.masks, tables.boxes)
    mask_boxes = _coordinates(tables.masks, openimages.MASK_COORDINATES)
    return match_boxes(mask_groups, mask_boxes, box_groups, _coordinates(tables.boxes, openimages.BOX_COORDINATES))


def annotate(tables: SplitTables, classes: Classes, image_ids: Collection[str]) -> dict[str, tuple[Annotation, ...]]:
    """Every annotation of the images (all of the tables' rows): boxes in their order, then masks that have no box."""
    box_of_mask = join(tables)
    mask_rows, box_rows = tables.masks.to_pylist(), tables.boxes.to_pylist()
    mask_of_box = {int(box): mask_rows[mask] for mask, box in enumerate(box_of_mask) if box >= 0}
    found: dict[str, list[Annotation]] = {image_id: [] for image_id in sorted(image_ids)}
    for number, row in enumerate(box_rows):
        found[row["ImageID"]].append(_annotation(row, mask_of_box.get(number), classes))
    for number, row in enumerate(mask_rows):
        if box_of_mask[number] < 0:
            found[row["ImageID"]].append(_annotation(None, row, classes))
    return {image_id: tuple(objects) for image_id, objects in found.items()}


def _metadata(row: Mapping) -> Metadata:
    rotation = row["Rotation"]
    return Metadata(
        rotation=int(rotation) % 360 if rotation is not None and rotation in (-270, -180, -90, 0, 90, 180, 270) else 0,
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
    x1, x2, y1, y2 = (row[name] for name in names)
    if not all(value is not None and abs(value) <= FAR for value in (x1, x2, y1, y2)):
        x1 = x2 = y1 = y2 = 0.0  # of a mask row: a box without extent, which the packer takes from the mask itself
    flags = {name: box is not None and box[name] == 1 for name in openimages.BOX_FLAGS}
    iou = None if mask is None else mask["PredictedIoU"]
    return Annotation(
        category_id=classes.owners[row["LabelName"]],
        label=row["LabelName"],
        box=(x1, x2, y1, y2),
        mask_path="" if mask is None else mask["MaskPath"],
        box_id="" if mask is None else mask["BoxID"],
        predicted_iou=iou if iou is not None and 0 <= iou <= 1 else None,
        is_group_of=flags["IsGroupOf"],
        is_occluded=flags["IsOccluded"],
        is_truncated=flags["IsTruncated"],
        is_depiction=flags["IsDepiction"],
        is_inside=flags["IsInside"],
    )


_BOX_KEY = ["ImageID", "LabelName", *openimages.BOX_COORDINATES]
_FLAG_COLUMNS = {flag: "Is" + "".join(word.capitalize() for word in flag.split("_")[1:]) for flag in FLAGS.values()}


def _flagged(boxes: pa.Table, drop: Iterable[str]) -> NDArray[np.bool_]:
    """(rows,) whether a box has one of the flags."""
    flagged = np.zeros(boxes.num_rows, dtype=np.bool_)
    for name in drop:
        flagged |= boxes[_FLAG_COLUMNS[FLAGS[name]]].to_numpy() == 1
    return flagged


def _estimate(masks: pa.Table) -> pa.ChunkedArray:
    """PredictedIoU; null where it is none."""
    values = masks["PredictedIoU"]
    return pc.if_else(pc.and_(pc.greater_equal(values, 0.0), pc.less_equal(values, 1.0)), values, None)


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


def _distinct(table: pa.Table, key: list[str], location: Location) -> pa.Table:
    """The first row of each key, in the table's order (in which Arrow does not give groups)."""
    numbered = table.select(key).append_column("number", pa.array(np.arange(table.num_rows)))
    first = numbered.group_by(key).aggregate([("number", "min")])["number_min"]
    distinct = table.take(pa.array(np.sort(first.to_numpy())))
    tell_left_out(location, table.num_rows - distinct.num_rows, "repeated among those of the chosen images")
    return distinct


def _with_safe(table: pa.Table, column: str, pattern: str, location: Location) -> pa.Table:
    """Only rows whose value can stand in a URL, key a sample, name a file."""
    safe = f"^(?:{pattern})$"
    what = f"with an impossible {column}"
    return leave_out(table, lambda rows: pc.match_substring_regex(rows[column], safe), location, what)


def _usable(boxes: pa.Table, location: Location) -> pa.Table:
    """Only rows whose box has an extent inside the image; the others cannot be boxes."""

    def good(rows: pa.Table) -> NDArray[np.bool_]:
        corners = _coordinates(rows, openimages.BOX_COORDINATES)
        x1, x2, y1, y2 = np.clip(corners, 0.0, 1.0).T
        good: NDArray[np.bool_] = (x2 > x1) & (y2 > y1) & (np.abs(corners) <= FAR).all(axis=1)  # false for NaN
        return good

    return leave_out(boxes, good, location, "whose box is empty, inverted or not of numbers")
