"""The annotation tables of one split of Open Images: read, filtered, and mask rows joined to box rows.

Coordinates are fractions of the image's width and height, in the order (x1, x2, y1, y2) of the tables. No table is kept
in memory between two calls: a cache (`builder.fetching.table_cache`) makes the second reading fast.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from builder.fetching.fetch import Inventory
from builder.fetching.table_cache import NO_CACHE, Cache
from builder.fetching.zip_members import locate_members
from builder.sources.base import FAR, FLAGS, Candidates, ClassTotals, Filters, candidates_by_class
from builder.sources.csv_tables import leave_out, read_table, warn_left_out
from builder.sources.openimages import layout as columns
from builder.sources.openimages.box_matching import match_boxes
from builder.sources.openimages.layout import Layout
from builder.sources.taxonomy import Classes
from builder.tasks.plan import Annotation, Member, Metadata, PlannedImage, PlannedObject
from shards.common.text import counted
from shards.format.sample import KEY
from shards.storage.location import Location

MASK_NAME = r"[A-Za-z0-9_-]{1,120}\.png"
BOX_KEY = ["ImageID", "LabelName", *columns.BOX_COORDINATES]  # rows of boxes that agree in these are repetitions
# Attribute of an annotation -> column of the box table.
FLAG_COLUMNS = {flag: "".join(word.capitalize() for word in flag.split("_")) for flag in FLAGS.values()}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenImagesSplit:
    """One split, restricted to the chosen classes and the filters (a `builder.sources.base.SourceSplit`).

    `name` is the split's in Open Images; of tables and zips only the versions in `inventory` are read.
    """

    layout: Layout
    name: str
    classes: Classes
    filters: Filters
    cache: Cache = NO_CACHE
    inventory: Inventory = field(default_factory=Inventory, compare=False, repr=False)

    def candidates(self) -> dict[int, Candidates]:
        """Return a dict from ids of requested classes to images with masks and with boxes only, after filters."""
        labels = pa.array(self.classes.wanted_labels, pa.string())
        needs_boxes = bool(self.filters.drop) or not self.filters.require_mask
        boxes = self._boxes({"LabelName": labels}) if needs_boxes else None
        masks = self._masks({"LabelName": labels})
        if boxes is not None and self.filters.drop:
            dropped = _flagged(boxes, self.filters.drop)  # [boxes]
            of_box = np.append(dropped, False)  # [boxes + 1]: the row of a mask without a box is -1
            masks = masks.filter(pa.array(~of_box[_join(masks, boxes)]))
            boxes = boxes.filter(pa.array(~dropped))
        estimates = masks["PredictedIoU"]  # those outside 0 to 1 count as none
        valid = pc.and_(pc.greater_equal(estimates, 0.0), pc.less_equal(estimates, 1.0))
        too_low = pc.and_(valid, pc.less(estimates, self.filters.min_predicted_iou))
        masks = masks.filter(pc.invert(pc.fill_null(too_low, False)))
        boxed = {} if boxes is None else self._images_by_class(boxes)
        return candidates_by_class(self.classes, self._images_by_class(masks), boxed)

    def totals(self) -> dict[int, ClassTotals]:
        """Return a dict from category ids to what the tables list of the class, repeated rows included."""
        labels = pa.array(sorted(self.classes.owners), pa.string())
        owners = pa.array([self.classes.owners[label] for label in labels.to_pylist()], pa.int32())

        def count(rows: pa.Table) -> pa.Table:
            category = owners.take(pc.index_in(rows["LabelName"], value_set=labels).combine_chunks())
            pairs = pa.table({"image": rows["ImageID"], "category": category})
            return pairs.group_by(["image", "category"]).aggregate([([], "count_all")])

        def counts(location: Location, types: Mapping[str, str], good: Callable[[pa.Table], Any]) -> pa.Table:
            return self._table(location, types, {"LabelName": labels}, lambda rows: count(rows.filter(good(rows))))

        boxes = counts(self.layout.boxes(self.name), columns.BOX_COLUMNS, lambda rows: pa.array(_have_extent(rows)))
        masks = counts(self.layout.masks(self.name), columns.MASK_COLUMNS, lambda rows: pc.is_valid(rows["MaskPath"]))
        images = pa.concat_tables([boxes, masks]).group_by(["image", "category"]).aggregate([])
        held = Counter(images["category"].to_pylist())
        rows_of = [
            dict(zip(*table.group_by("category").aggregate([("count_all", "sum")]).to_pydict().values(), strict=True))
            for table in (masks, boxes)
        ]
        return {c: ClassTotals(held[c], *(rows.get(c, 0) for rows in rows_of)) for c in sorted(held)}

    def backgrounds(self) -> tuple[str, ...]:
        """Return none: that an image is in no table of a class says nothing about the class."""
        return ()

    def find(self, names: Collection[str]) -> dict[str, str]:
        """Return the names that are ImageIDs in the split's tables, as a mapping to themselves."""
        wanted = {"ImageID": pa.array(sorted(name for name in names if KEY.fullmatch(name)), pa.string())}
        tables = [self._metadata(wanted), self._boxes(wanted), self._masks(wanted)]
        return {image_id: image_id for table in tables for image_id in pc.unique(table["ImageID"]).to_pylist()}

    def describe(self, image_ids: Collection[str]) -> dict[str, PlannedImage]:
        """Return everything that the tables and the zips' directories state about the images."""
        where = {
            "LabelName": pa.array(sorted(self.classes.owners), pa.string()),
            "ImageID": pa.array(sorted(image_ids), pa.string()),
        }
        masks = _distinct(self._masks(where), ["MaskPath"], self.layout.masks(self.name))
        boxes = _distinct(self._boxes(where), BOX_KEY, self.layout.boxes(self.name))
        annotations = _annotate(masks, boxes, self.classes, image_ids)
        # Three reads that mostly wait for the network.
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
        """Return a dict from images to the labels that people verified as present and as absent, if there are any."""
        labels = pa.array(self.classes.verifiable, pa.string())
        where = {"LabelName": labels, "ImageID": pa.array(sorted(image_ids), pa.string())}
        table = self._table(self.layout.labels(self.name), columns.LABEL_COLUMNS, where)
        present: dict[str, set[str]] = defaultdict(set)
        absent: dict[str, set[str]] = defaultdict(set)
        for row in table.to_pylist():
            verdict = {1.0: present, 0.0: absent}.get(row["Confidence"])
            if verdict is not None:  # values between 0 and 1 are machine estimates, not verifications
                verdict[row["ImageID"]].add(row["LabelName"])
        return {image: (frozenset(present[image]), frozenset(absent[image])) for image in {*present, *absent}}

    def metadata(self, image_ids: Collection[str]) -> dict[str, Metadata]:
        """Return a dict from images to licence, author, URL and rotation, for images that the table lists."""
        table = self._metadata({"ImageID": pa.array(sorted(image_ids), pa.string())})
        return {row["ImageID"]: _metadata(row) for row in reversed(table.to_pylist())}  # the first of repeated rows

    def _metadata(self, where: Mapping[str, pa.Array]) -> pa.Table:
        return self._table(self.layout.metadata(self.name), columns.METADATA_COLUMNS, where, newlines=True)

    def _masks(self, where: Mapping[str, pa.Array]) -> pa.Table:
        """Return rows whose ImageID can be the key of a sample and whose MaskPath can name a file in a zip."""
        location = self.layout.masks(self.name)
        masks = _matching(self._table(location, columns.MASK_COLUMNS, where), "ImageID", KEY.pattern, location)
        return _matching(masks, "MaskPath", MASK_NAME, location)

    def _boxes(self, where: Mapping[str, pa.Array]) -> pa.Table:
        """Return rows whose ImageID can be the key of a sample and whose box has an extent inside the image."""
        location = self.layout.boxes(self.name)
        boxes = _matching(self._table(location, columns.BOX_COLUMNS, where), "ImageID", KEY.pattern, location)
        return leave_out(boxes, _have_extent, location, "whose box is empty, inverted or not of numbers")

    def _table(
        self,
        location: Location,
        types: Mapping[str, str],
        where: Mapping[str, pa.Array],
        reduce: Callable[[pa.Table], pa.Table] = lambda rows: rows,
        *,
        newlines: bool = False,
    ) -> pa.Table:
        return read_table(
            location,
            types,
            where,
            newlines_in_values=newlines,
            reduce=reduce,
            cache=self.cache,
            inventory=self.inventory,
        )

    def _images_by_class(self, table: pa.Table) -> dict[int, set[str]]:
        owners = self.classes.owners
        pairs = table.group_by(["ImageID", "LabelName"]).aggregate([])
        found: dict[int, set[str]] = defaultdict(set)
        for label in pc.unique(pairs["LabelName"]).to_pylist():
            found[owners[label]].update(pairs["ImageID"].filter(pc.equal(pairs["LabelName"], label)).to_pylist())
        return found

    def _locate(self, annotations: Mapping[str, Iterable[Annotation]]) -> dict[str, Member]:
        """Return a dict from mask paths to members of zips, without masks that no zip contains."""
        wanted: dict[Location, list[str]] = defaultdict(list)
        for image_id, objects in annotations.items():
            paths = [annotation.mask_path for annotation in objects if annotation.mask_path]
            # There is a zip per hexadecimal digit; the masks of an ImageID that starts otherwise are missing.
            if paths and image_id[0] in "0123456789abcdefABCDEF":
                wanted[self.layout.mask_zip(self.name, image_id)] += paths
        if not wanted:
            return {}
        masks, zips = counted(sum(map(len, wanted.values())), "mask"), counted(len(wanted), "zip")
        logger.info("locating %s of %s in %s", masks, self.name, zips)
        return locate_members(wanted, cache=self.cache, inventory=self.inventory)


def _join(masks: pa.Table, boxes: pa.Table) -> NDArray[np.int64]:
    """Return the row of each mask's box, the nearest of the same image and label, or -1 without one: [masks]."""
    keys = [
        pc.binary_join_element_wise(table["ImageID"], table["LabelName"], " ").combine_chunks()
        for table in (masks, boxes)
    ]
    # Numbers the pairs (image, label) over both tables.
    groups = np.asarray(pa.concat_arrays(keys).dictionary_encode().indices.to_numpy(), dtype=np.int64)
    return match_boxes(
        groups[: masks.num_rows],
        _coordinates(masks, columns.MASK_COORDINATES),
        groups[masks.num_rows :],
        _coordinates(boxes, columns.BOX_COORDINATES),
    )


def _annotate(
    masks: pa.Table, boxes: pa.Table, classes: Classes, image_ids: Collection[str]
) -> dict[str, tuple[Annotation, ...]]:
    """Return a dict from images to annotations: boxes in the order of their table, then masks without a box."""
    box_of_mask = _join(masks, boxes)
    mask_rows = masks.to_pylist()
    mask_of_box = {int(box): mask_rows[mask] for mask, box in enumerate(box_of_mask) if box >= 0}
    found: dict[str, list[Annotation]] = {image_id: [] for image_id in sorted(image_ids)}
    for number, row in enumerate(boxes.to_pylist()):
        found[row["ImageID"]].append(_annotation(row, mask_of_box.get(number), classes))
    for number, row in enumerate(mask_rows):
        if box_of_mask[number] < 0:
            found[row["ImageID"]].append(_annotation(None, row, classes))
    return {image_id: tuple(objects) for image_id, objects in found.items()}


def _metadata(row: Mapping[str, Any]) -> Metadata:
    rotation = row["Rotation"]
    return Metadata(
        rotation=int(rotation) % 360 if rotation is not None and rotation in (-270, -180, -90, 0, 90, 180, 270) else 0,
        license=row["License"],
        author=row["Author"],
        author_url=row["AuthorProfileURL"],
        original_url=row["OriginalURL"],
        title=row["Title"],
    )


def _annotation(box: Mapping[str, Any] | None, mask: Mapping[str, Any] | None, classes: Classes) -> Annotation:
    row, names = (mask, columns.MASK_COORDINATES) if box is None else (box, columns.BOX_COORDINATES)
    assert row is not None
    x1, x2, y1, y2 = (row[name] for name in names)
    if not all(value is not None and abs(value) <= FAR for value in (x1, x2, y1, y2)):
        x1 = x2 = y1 = y2 = 0.0  # only in a mask row: without an extent, the packer takes the box from the mask itself
    iou = None if mask is None else mask["PredictedIoU"]
    flags: dict[str, Any] = {flag: box is not None and box[column] == 1 for flag, column in FLAG_COLUMNS.items()}
    return Annotation(
        category_id=classes.owners[row["LabelName"]],
        label=row["LabelName"],
        box=(x1, x2, y1, y2),
        mask_path="" if mask is None else mask["MaskPath"],
        box_id="" if mask is None else mask["BoxID"],
        predicted_iou=iou if iou is not None and 0 <= iou <= 1 else None,
        **flags,
    )


def _flagged(boxes: pa.Table, drop: Iterable[str]) -> NDArray[np.bool_]:
    """Return whether each box has one of the flags: bool [boxes]."""
    flagged = np.zeros(boxes.num_rows, dtype=np.bool_)
    for name in drop:
        flagged |= boxes[FLAG_COLUMNS[FLAGS[name]]].to_numpy() == 1
    return flagged


def _coordinates(table: pa.Table, names: Iterable[str]) -> NDArray[np.float64]:
    """Return the columns as float64 [rows, 4]; null is NaN."""
    return np.stack([table[name].to_numpy().astype(np.float64) for name in names], axis=1)


def _have_extent(boxes: pa.Table) -> NDArray[np.bool_]:
    """Return whether each box has an extent inside the image: bool [boxes]."""
    corners = _coordinates(boxes, columns.BOX_COORDINATES)
    x1, x2, y1, y2 = np.clip(corners, 0.0, 1.0).T
    good: NDArray[np.bool_] = (x2 > x1) & (y2 > y1) & (np.abs(corners) <= FAR).all(axis=1)  # false for NaN
    return good


def _matching(table: pa.Table, column: str, pattern: str, location: Location) -> pa.Table:
    """The rows whose value can be the key of a sample, or part of a URL or file name."""
    whole = f"^(?:{pattern})$"
    what = f"with an impossible {column}"
    return leave_out(table, lambda rows: pc.match_substring_regex(rows[column], whole), location, what)


def _distinct(table: pa.Table, key: list[str], location: Location) -> pa.Table:
    """The first row of each key, in the table's order (Arrow returns groups in another order)."""
    numbered = table.select(key).append_column("number", pa.array(np.arange(table.num_rows)))
    first = numbered.group_by(key).aggregate([("number", "min")])["number_min"]
    distinct = table.take(pa.array(np.sort(first.to_numpy())))
    warn_left_out(location, table.num_rows - distinct.num_rows, "repeated among those of the chosen images")
    return distinct
