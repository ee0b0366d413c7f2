"""What the format promises of the contents of a sample: its picture, its boxes and its masks."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Set

from PIL import Image

from shards import rle
from shards.errors import SampleError
from shards.sample import Instance, Sample

SLACK = 0.01  # pixels by which a box may leave the image: coordinates are rounded to 1/1000
COVERED = 0.5  # least share of the mask's tight box that lies in the object's box,
PIXEL = 1.0  # widened by as much on every side: a small object's mask is whole pixels, its box is not


def check_contents(sample: Sample, categories: Set[int], where: str) -> None:
    """What is to be drawn or written as files must not have a fault: sizes and masks of a shard are anybody's numbers.

    Args:
        sample: as it was read.
        categories: ids of the dataset's classes.
        where: the shard, named in the error.

    Raises:
        SampleError: the first fault of the sample.
    """
    for fault in content_faults(sample, None, categories):
        raise SampleError(f"{where}: sample {sample.image_id}: {fault}")


def content_faults(sample: Sample, stored: bytes | None, categories: Set[int]) -> Iterator[str]:
    """Everything that is wrong with a sample, one line each.

    Args:
        sample: as it was read.
        stored: its JSON member; None where it does not matter whether that is canonical.
        categories: ids of the dataset's classes.
    """
    yield from _picture_faults(sample)
    for name in ("verified_present", "verified_absent"):
        unknown = sorted(set(getattr(sample, name)) - categories)
        if unknown:
            yield f"{name} has {unknown[0]}, which is not the id of a class"
    faulty = False
    for number, instance in enumerate(sample.instances):
        for fault in instance_faults(instance, sample.width, sample.height, categories):
            faulty = True
            yield f"annotation {number}{f' (box {instance.box_id})' if instance.box_id else ''}: {fault}"
    if faulty:
        return  # what follows writes the sample anew, which takes no mask of another size
    try:
        canonical = sample.to_members()["json"]
    except (SampleError, ValueError) as error:
        yield f"{sample.image_id}.json: {error}"
        return
    if stored is not None and canonical != stored:
        yield f"{sample.image_id}.json is not the canonical JSON of the format, or of another image"


def instance_faults(instance: Instance, width: int, height: int, categories: Set[int]) -> Iterator[str]:
    """Everything that is wrong with one annotation of an image of that size in pixels."""
    if instance.category_id not in categories:
        yield f"category_id {instance.category_id} is not the id of a class"
    x, y, w, h = instance.bbox
    shown = f"[{x:g}, {y:g}, {w:g}, {h:g}]"
    if not all(map(math.isfinite, instance.bbox)):
        yield f"bbox {shown} is not of numbers"
    elif w <= 0 or h <= 0:
        yield f"bbox {shown} is empty"
    elif x < -SLACK or y < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
        yield f"bbox {shown} leaves the image of {width}x{height}"
    mask = instance.segmentation
    if mask is None:
        return
    if (mask.width, mask.height) != (width, height):
        yield f"the RLE is of {mask.width}x{mask.height}, the image {width}x{height}"
        return
    try:
        runs = rle.runs(mask)
    except ValueError as error:
        yield f"the RLE cannot be decoded: {error}"
        return
    if (len(runs) and runs.min() < 0) or runs.sum() != width * height:
        yield f"the RLE has runs of {runs.sum()} pixels, the image {width * height}"
    elif not runs[1::2].sum():
        yield "the RLE is empty: no pixel is the object's"
    elif _covered(rle.bounds(mask), instance.bbox) < COVERED:
        left, top, wide, high = rle.bounds(mask)
        yield f"the mask lies at [{left:g}, {top:g}, {wide:g}, {high:g}], mostly outside of its bbox {shown}"


def _picture_faults(sample: Sample) -> Iterator[str]:
    name = f"{sample.image_id}.jpg"
    try:
        with Image.open(io.BytesIO(sample.image), formats=("JPEG",)) as picture:
            if picture.size != (sample.width, sample.height):
                found = f"{picture.width}x{picture.height}"
                yield f"{name} is {found}, {sample.image_id}.json says {sample.width}x{sample.height}"
            # An eighth of the size: all of the file is read, and most of the arithmetic saved.
            picture.draft("RGB", (-(-picture.width // 8), -(-picture.height // 8)))
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        yield f"{name} cannot be decoded: {' '.join(str(error).split())}"


def _covered(mask: tuple[float, float, float, float], box: tuple[float, float, float, float]) -> float:
    """The share of the first rectangle that lies in the second, widened; both x, y, w, h."""
    width = min(mask[0] + mask[2], box[0] + box[2] + PIXEL) - max(mask[0], box[0] - PIXEL)
    height = min(mask[1] + mask[3], box[1] + box[3] + PIXEL) - max(mask[1], box[1] - PIXEL)
    return max(width, 0.0) * max(height, 0.0) / (mask[2] * mask[3])
