"""Ultralytics' segmentation layout: `images/<split>`, `labels/<split>` and `data.yaml`.

Format: https://docs.ultralytics.com/datasets/segment/. A line of a label file is the class, from 0, and one polygon
in fractions of the image's width and height. A mask of several parts is one polygon, whose parts are joined by lines
there and back, as Ultralytics' own converter of COCO joins them; holes are joined in the same way.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import numpy as np
import yaml
from numpy.typing import NDArray

from shards.drawing.contours import contours, joined, simplify
from shards.export.export import Export, Tally, samples, write
from shards.format import rle
from shards.format.dataset import SPLITS
from shards.format.sample import Instance, Sample

EXACT = 200  # corners up to which a contour follows every pixel; of a longer one, stairs become slopes
TOLERANCE = 0.75  # pixels by which a longer one may leave its mask's edge
MOST_PARTS = 500  # of a polygon; noise can have more

AS_BOX = "objects without a mask, written as the four corners of their box"
GROUPS = "group-of regions, left out: the format has no crowds"
JOINED = "objects of several parts or with holes, joined by lines into one polygon"
SMALL_PARTS = f"objects of more than {MOST_PARTS} parts and holes, of which the smallest are left out"


def write_split(export: Export, tally: Tally) -> None:
    """Write the images and labels of a split, and `data.yaml` with all splits that the folder then has."""
    classes = {category.id: number for number, category in enumerate(export.dataset.categories)}
    for _, sample in samples(export, tally):
        lines = [f"{classes[instance.category_id]} {line}" for instance, line in polygons(sample, tally)]
        tally.objects += len(lines)
        tally.empty += not lines
        write(export.out / "images" / tally.split / sample.file_name, sample.image)
        write(export.out / "labels" / tally.split / f"{sample.image_id}.txt", "".join(f"{s}\n" for s in lines).encode())
    names = dict(enumerate(category.name for category in export.dataset.categories))
    data = {split: f"images/{split}" for split in _splits(export)} | {"names": names}
    write(export.out / "data.yaml", yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode())


def next_step(export: Export, tallies: Sequence[Tally]) -> str:
    """Return the command that trains on the files."""
    missing = [split for split in ("train", "val") if split not in _splits(export)]
    if missing:
        wanted = " and ".join(missing)
        return f"data.yaml needs train and val: export {wanted} to the same folder, or name another split in it"
    return shlex.join(["yolo", "segment", "train", f"data={export.out / 'data.yaml'}", "model=yolo11n-seg.pt"])


def polygons(sample: Sample, tally: Tally) -> list[tuple[Instance, str]]:
    """Return each object of an image that the format can hold, with the coordinates of its polygon as text."""
    found = []
    for instance in sample.instances:
        if instance.is_group_of:
            tally.remarks[GROUPS] += 1
            continue
        points = outline(instance, tally) / (sample.width, sample.height)
        found.append((instance, " ".join(f"{value:.6f}" for value in points.clip(0, 1).ravel())))
    return found


def outline(instance: Instance, tally: Tally) -> NDArray[np.float64]:
    """Return an object's polygon [n, 2] x, y in pixels: its mask's, else the corners of its box."""
    mask = instance.segmentation
    if mask is None or not rle.area(mask):
        tally.remarks[AS_BOX] += 1
        x, y, w, h = instance.bbox
        return np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)])
    left, top, width, height = map(int, rle.bounds(mask))
    rings = contours(rle.decode(mask)[top : top + height, left : left + width].astype(np.bool_))
    tally.remarks[JOINED] += len(rings) > 1
    tally.remarks[SMALL_PARTS] += len(rings) > MOST_PARTS
    largest = sorted(rings, key=len, reverse=True)[:MOST_PARTS]
    whole = joined([ring if len(ring) <= EXACT else simplify(ring, TOLERANCE) for ring in largest])
    return np.asarray(whole + np.array((left, top)), np.float64)


def _splits(export: Export) -> list[str]:
    return [split for split in SPLITS if (export.out / "images" / split).is_dir()]
