"""A mirror of many images in the layout of Open Images, for benchmarks.

The images are real photographs if a small mirror of them is available, otherwise drawn scenes. They are repeated under
new ImageIDs until there are enough.
"""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from demo.scenes import SceneConfig, write_open_images

PHOTOGRAPHS = Path(__file__).parents[1] / ".." / "shared" / "openimages-sample"
LABELS = {"/m/01g317", "/m/0k4j", "/m/015qff", "/m/01mqdt", "/m/04yx4", "/m/03bt1vf", "/m/02pv19", "/m/05r655"}

TABLES = {
    "v5/train-annotations-object-segmentation.csv": "masks",
    "v6/oidv6-train-annotations-bbox.csv": "boxes",
    "v5/train-annotations-human-imagelabels-boxable.csv": "labels",
    "2018_04/train/train-images-boxable-with-rotation.csv": "metadata",
}


@dataclass(frozen=True)
class Bucket:
    """Two roots like those of Open Images, with a train split only.

    Attributes:
        images, annotations: the roots, in a temporary folder.
        image_ids: every image; each has a mask of a traffic class.
        masks: (name of the zip, member) of every mask of a traffic class.
        what: description of the images for a table.
    """

    images: Path
    annotations: Path
    image_ids: tuple[str, ...]
    masks: tuple[tuple[str, str], ...]
    what: str

    @property
    def image_bytes(self) -> int:
        """The bytes of all JPEGs."""
        return sum(path.stat().st_size for path in (self.images / "train").iterdir())


@contextmanager
def make_bucket(count: int, photographs: Path | None = None, long_side: int | None = None) -> Iterator[Bucket]:
    """Write a mirror of `count` train images into a temporary folder.

    Args:
        count: number of images.
        photographs: mirror whose images are repeated; by default `PHOTOGRAPHS` if it exists, otherwise drawn scenes.
        long_side: longer side of the images in pixels; None to leave them unchanged.
    """
    with tempfile.TemporaryDirectory(prefix="bucket-") as folder:
        origin = photographs or PHOTOGRAPHS
        what = "photographs"
        if not origin.is_dir():
            origin, what = Path(folder) / "drawn", "drawn scenes of 1024 pixels"
            write_open_images(origin, SceneConfig(train=60, validation=0, test=0, long_side=1024))
        if long_side:
            what += f", resized to {long_side} pixels"
        yield _repeat(origin, Path(folder) / "mirror", count, what, long_side)


def _repeat(origin: Path, out: Path, count: int, what: str, long_side: int | None) -> Bucket:
    images, annotations = out / "images", out / "openimages"
    (images / "train").mkdir(parents=True)
    for name in ("v5/class-descriptions-boxable.csv", "2018_04/bbox_labels_600_hierarchy.json"):
        (annotations / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(origin / "openimages" / name, annotations / name)
    tables = {name: _rows(origin / "openimages" / name) for name in TABLES}
    archives = {
        d: zipfile.ZipFile(origin / f"openimages/v5/train-masks/train-masks-{d}.zip") for d in "0123456789abcdef"
    }
    mask_table = tables["v5/train-annotations-object-segmentation.csv"][1]
    usable = [image for image in sorted(mask_table) if _is_usable(image, mask_table[image], origin, archives)]
    new_ids = [hashlib.sha256(f"copy {n}".encode()).hexdigest()[:16] for n in range(count)]
    packed: dict[str, list[tuple[str, bytes, bool]]] = defaultdict(list)
    for n, new in enumerate(new_ids):
        old = usable[n % len(usable)]
        jpeg = images / f"train/{new}.jpg"
        if n >= len(usable):  # a copy of an image that was written before
            shutil.copy(images / f"train/{new_ids[n - len(usable)]}.jpg", jpeg)
        else:
            _copy_picture(origin / f"open-images-dataset/train/{old}.jpg", jpeg, long_side)
        for row in mask_table[old]:
            name, data = row["MaskPath"].replace(old, new), archives[old[0]].read(row["MaskPath"])
            packed[new[0]].append((name, data, row["LabelName"] in LABELS))
    for name, (header, rows) in tables.items():
        _write(annotations / name, header, rows, [(usable[n % len(usable)], new) for n, new in enumerate(new_ids)])
    folder = annotations / "v5/train-masks"
    folder.mkdir(parents=True)
    for digit in "0123456789abcdef":
        with zipfile.ZipFile(folder / f"train-masks-{digit}.zip", "w", zipfile.ZIP_STORED) as archive:
            for name, data, _ in packed[digit]:
                archive.writestr(name, data)
    masks = tuple(
        (f"train-masks-{digit}.zip", name) for digit, members in packed.items() for name, _, own in members if own
    )
    return Bucket(images, annotations, tuple(new_ids), masks, what)


def _copy_picture(source: Path, target: Path, long_side: int | None) -> None:
    if long_side is None:
        shutil.copy(source, target)
        return
    with Image.open(source) as picture:
        scale = long_side / max(picture.size)
        size = round(picture.width * scale), round(picture.height * scale)
        picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(target, "JPEG", quality=90)


def _rows(path: Path) -> tuple[list[str], dict[str, list[dict[str, str]]]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows: dict[str, list[dict[str, str]]] = defaultdict(list)
        for row in reader:
            rows[row["ImageID"]].append(row)
        return list(reader.fieldnames or ()), rows


def _is_usable(image: str, masks: list[dict[str, str]], origin: Path, archives: dict[str, zipfile.ZipFile]) -> bool:
    """Whether image and masks are undamaged, and one of the masks is of a traffic class."""
    if not any(row["LabelName"] in LABELS for row in masks):
        return False
    try:
        Image.open(origin / f"open-images-dataset/train/{image}.jpg").load()
        for row in masks:
            picture = Image.open(io.BytesIO(archives[image[0]].read(row["MaskPath"])))
            picture.load()
            if not picture.getbbox():
                return False
    except (OSError, KeyError):
        return False
    return True


def _write(path: Path, header: list[str], rows: dict[str, list[dict[str, str]]], pairs: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        for old, new in pairs:
            for row in rows.get(old, ()):
                renamed = {"ImageID": new}
                if "MaskPath" in row:
                    renamed["MaskPath"] = row["MaskPath"].replace(old, new)
                writer.writerow(row | renamed)
