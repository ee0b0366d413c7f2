"""Write annotations in the layout of Open Images V5/V6: the CSVs, the class files, the hierarchy and the mask zips.

Columns and paths: https://storage.googleapis.com/openimages/web/download_v5.html and download_v6.html. The
peculiarities of the real files are reproduced: train boxes have eight more columns, class-descriptions has no header,
and the mask table formats the coordinates of the box table differently.
"""

import csv
import io
import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")
MASK_COLUMNS = [
    "MaskPath",
    "ImageID",
    "LabelName",
    "BoxID",
    "BoxXMin",
    "BoxXMax",
    "BoxYMin",
    "BoxYMax",
    "PredictedIoU",
    "Clicks",
]
BOX_COLUMNS = [
    "ImageID",
    "Source",
    "LabelName",
    "Confidence",
    "XMin",
    "XMax",
    "YMin",
    "YMax",
    "IsOccluded",
    "IsTruncated",
    "IsGroupOf",
    "IsDepiction",
    "IsInside",
]
CLICK_COLUMNS = [f"XClick{click}{axis}" for axis in "XY" for click in range(1, 5)]
LABEL_COLUMNS = ["ImageID", "Source", "LabelName", "Confidence"]
IMAGE_COLUMNS = [
    "ImageID",
    "Subset",
    "OriginalURL",
    "OriginalLandingURL",
    "License",
    "AuthorProfileURL",
    "Author",
    "Title",
    "OriginalSize",
    "OriginalMD5",
    "Thumbnail300KURL",
    "Rotation",
]

# A part of class-descriptions-boxable.csv: what is drawn, its relatives, and classes that are only verified absent.
CLASSES = {
    "/m/01bl7v": "Boy",
    "/m/01bjv": "Bus",
    "/m/01g317": "Person",
    "/m/01jfm_": "Vehicle registration plate",
    "/m/01lcw4": "Limousine",
    "/m/01mqdt": "Traffic sign",
    "/m/01prls": "Land vehicle",
    "/m/015qff": "Traffic light",
    "/m/0199g": "Bicycle",
    "/m/02pv19": "Stop sign",
    "/m/03bt1vf": "Woman",
    "/m/033rq4": "Street light",
    "/m/04hgtk": "Human head",
    "/m/04yx4": "Man",
    "/m/05r655": "Girl",
    "/m/07j7r": "Tree",
    "/m/07r04": "Truck",
    "/m/07yv9": "Vehicle",
    "/m/083wq": "Wheel",
    "/m/0bt9lr": "Dog",
    "/m/0cgh4": "Building",
    "/m/0dzct": "Human face",
    "/m/0h2r6": "Van",
    "/m/0k4j": "Car",
    "/m/0pg52": "Taxi",
}
SEGMENTABLE = [
    "/m/01bjv",
    "/m/01bl7v",
    "/m/01g317",
    "/m/01jfm_",
    "/m/01lcw4",
    "/m/01mqdt",
    "/m/015qff",
    "/m/0199g",
    "/m/02pv19",
    "/m/03bt1vf",
    "/m/04yx4",
    "/m/05r655",
    "/m/07r04",
    "/m/0bt9lr",
    "/m/0h2r6",
    "/m/0k4j",
    "/m/0pg52",
]

Tree = dict[str, Any]


@dataclass(frozen=True)
class BoxRow:
    """One object of an image.

    Attributes:
        box: (left, top, right, bottom) in 0..1.
        extremes: (x, y) of its leftmost, topmost, rightmost and lowest point, for train's click columns.
        mask_png: bytes of its 1-bit PNG, or None for a box without a mask.
    """

    label: str
    box: tuple[float, float, float, float]
    extremes: tuple[tuple[float, float], ...]
    is_occluded: bool
    is_truncated: bool
    is_group_of: bool
    box_id: str
    mask_png: bytes | None
    predicted_iou: float
    clicks: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class ImageRecord:
    """One image: its size in pixels, its boxes, its verified classes, and its row of metadata."""

    image_id: str
    width: int
    height: int
    boxes: tuple[BoxRow, ...]
    present: tuple[str, ...]
    absent: tuple[str, ...]
    metadata: tuple[str, ...]


def write_classes(root: Path) -> None:
    """Write the class files that all splits share, under `<root>/v5` and `<root>/2018_04`."""
    _write_csv(root / "v5" / "class-descriptions-boxable.csv", None, sorted(CLASSES.items()))
    _write(root / "v5" / "classes-segmentation.txt", "".join(f"{mid}\n" for mid in sorted(SEGMENTABLE)).encode())
    hierarchy = json.dumps(_hierarchy(), indent=4).encode()
    _write(root / "2018_04" / "bbox_labels_600_hierarchy.json", hierarchy)


def write_split(root: Path, split: str, images: Sequence[ImageRecord]) -> None:
    """Write every table and zip of one split under `<root>/{v5,v6,2018_04}`, in the given order."""
    v5, train = root / "v5", split == "train"
    boxes = root / "v6" / "oidv6-train-annotations-bbox.csv" if train else v5 / f"{split}-annotations-bbox.csv"
    _write_csv(
        boxes,
        BOX_COLUMNS + (CLICK_COLUMNS if train else []),
        (_box_cells(image, row, train) for image in images for row in image.boxes),
    )
    masks = [(image, row) for image in images for row in image.boxes if row.mask_png is not None]
    _write_csv(
        v5 / f"{split}-annotations-object-segmentation.csv", MASK_COLUMNS, (_mask_cells(*mask) for mask in masks)
    )
    _write_csv(
        v5 / f"{split}-annotations-human-imagelabels-boxable.csv",
        LABEL_COLUMNS,
        (
            (image.image_id, "verification", label, verdict)
            for image in images
            for verdict, labels in ((1, image.present), (0, image.absent))
            for label in labels
        ),
    )
    metadata = "train-images-boxable-with-rotation.csv" if train else f"{split}-images-with-rotation.csv"
    _write_csv(root / "2018_04" / split / metadata, IMAGE_COLUMNS, (image.metadata for image in images))
    for digit in "0123456789abcdef":
        members = [(mask_path(image, row), row.mask_png) for image, row in masks if image.image_id[0] == digit]
        path = v5 / f"{split}-masks" / f"{split}-masks-{digit}.zip"
        _write(path, _zip(members, zipfile.ZIP_DEFLATED if int(digit, 16) % 2 else zipfile.ZIP_STORED))


def mask_path(image: ImageRecord, row: BoxRow) -> str:
    """`<ImageID>_<MID without slashes>_<BoxID>.png`."""
    return f"{image.image_id}_{row.label.replace('/', '')}_{row.box_id}.png"


def _box_cells(image: ImageRecord, row: BoxRow, train: bool) -> list[object]:
    left, top, right, bottom = (f"{value:.6f}" for value in row.box)
    flags = [int(row.is_occluded), int(row.is_truncated), int(row.is_group_of), 0, 0]
    clicks = [f"{point[axis]:.6f}" for axis in (0, 1) for point in row.extremes] if train else []
    return [image.image_id, "xclick", row.label, 1, left, right, top, bottom, *flags, *clicks]


def _mask_cells(image: ImageRecord, row: BoxRow) -> list[object]:
    # Every eighth row is off by the last bit of a float, as if a spreadsheet had saved the box table again.
    resaved = int(row.box_id, 16) % 8 == 0
    left, top, right, bottom = (
        repr(math.nextafter(float(f"{value:.6f}"), 0.0)) if resaved else f"{value:g}" for value in row.box
    )
    clicks = ";".join(f"{x:.5f} {y:.5f} {inside}" for x, y, inside in row.clicks)
    name = mask_path(image, row)
    return [name, image.image_id, row.label, row.box_id, left, right, top, bottom, f"{row.predicted_iou:.5f}", clicks]


def _hierarchy() -> Tree:
    """Return the real hierarchy, reduced to `CLASSES`. Taxi is a Land vehicle in it, not a kind of Car."""

    def node(name: str, kinds: Iterable[Tree] = (), parts: Iterable[Tree] = ()) -> Tree:
        tree: Tree = {"LabelName": next(mid for mid, described in CLASSES.items() if described == name)}
        return tree | ({"Part": list(parts)} if parts else {}) | ({"Subcategory": list(kinds)} if kinds else {})

    car = node("Car", [node("Limousine"), node("Van")])
    vehicles = [node("Bicycle"), node("Bus"), node("Truck"), car, node("Taxi")]
    land = node("Land vehicle", vehicles, [node("Vehicle registration plate"), node("Wheel")])
    people = [node("Man"), node("Woman"), node("Boy"), node("Girl")]
    return {
        "LabelName": "/m/0bl9f",  # Entity: it has no row in class-descriptions-boxable.csv
        "Subcategory": [
            node("Traffic light"),
            node("Traffic sign", [node("Stop sign")]),
            node("Person", people, [node("Human head"), node("Human face")]),
            node("Vehicle", [land]),
            node("Street light"),
            node("Tree"),
            node("Building"),
            node("Dog"),
        ],
    }


def _zip(members: Iterable[tuple[str, bytes | None]], compression: int) -> bytes:
    """Return a zip with a fixed time in every member; without members it is a valid empty zip of 22 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name, (2019, 5, 1, 0, 0, 0))
            info.create_system, info.external_attr, info.compress_type = 3, 0o600 << 16, compression
            archive.writestr(info, data or b"")
    return buffer.getvalue()


def _write_csv(path: Path, header: Sequence[str] | None, rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(header)
    writer.writerows(rows)
    _write(path, text.getvalue().encode())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
