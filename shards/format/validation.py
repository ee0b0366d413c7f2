"""Checks of a sample's contents: its picture, its boxes and its masks."""

import math
from collections.abc import Iterator, Set

from shards.common.errors import SampleError
from shards.common.text import one_line
from shards.format import rle
from shards.format.image import ImageError, image_size
from shards.format.sample import Instance, MaskPrediction, Sample, box_fault, shown_box

Rectangle = tuple[float, float, float, float]  # x, y, w, h in pixels
ROTATIONS = (0, 90, 180, 270)
COVERED = 0.5  # minimum share of a mask's tight box that is inside the object's box,
MARGIN = 1.0  # extended by a pixel on every side: the mask of a small object has whole pixels, its box has not


def check_contents(sample: Sample, categories: Set[int], where: str) -> None:
    """Raise a SampleError for the first fault of a sample of the shard `where`, before it is drawn or extracted."""
    for fault in content_faults(sample, None, categories):
        raise SampleError(f"{where}: sample {sample.image_id}: {fault}")


def content_faults(sample: Sample, stored: bytes | None, categories: Set[int]) -> Iterator[str]:
    """Yield each fault of a sample, on one line; `stored` is its JSON member, None if that is not to be compared."""
    yield from _picture_faults(sample)
    if sample.rotation not in ROTATIONS:
        yield f"rotation is {sample.rotation}, not one of {', '.join(map(str, ROTATIONS))}"
    yield from _label_faults(sample, categories)
    faulty = False
    for number, instance in enumerate(sample.instances):
        for fault in instance_faults(instance, sample.width, sample.height, categories):
            faulty = True
            yield f"annotation {number}{f' (box {instance.box_id})' if instance.box_id else ''}: {fault}"
    if faulty:
        return  # a sample with a mask of another size cannot be encoded again
    try:
        canonical = sample.to_members()["json"]
    except (SampleError, ValueError) as error:
        yield f"{sample.image_id}.json: {error}"
        return
    if stored is not None and canonical != stored:
        yield f"{sample.image_id}.json is not the canonical JSON of the format, or of another image"


def _label_faults(sample: Sample, categories: Set[int]) -> Iterator[str]:
    for name in ("verified_present", "verified_absent", "not_exhaustive"):
        ids = getattr(sample, name)
        if unknown := sorted(set(ids) - categories):
            yield f"{name} has {unknown[0]}, which is not the id of a class"
        if len(set(ids)) != len(ids):
            yield f"{name} has {next(number for number in ids if ids.count(number) > 1)} more than once"
    if both := sorted(set(sample.verified_present) & set(sample.verified_absent)):
        yield f"class {both[0]} is verified as present and as absent"
    if both := sorted(set(sample.not_exhaustive) & set(sample.verified_absent)):
        yield f"class {both[0]} is not annotated exhaustively, and verified as absent"


def instance_faults(instance: Instance, width: int, height: int, categories: Set[int]) -> Iterator[str]:
    """Yield each fault of one annotation of an image of that size in pixels."""
    if instance.category_id not in categories:
        yield f"category_id {instance.category_id} is not the id of a class"
    if problem := box_fault(instance.bbox, width, height):
        yield problem
    elif not all(instance.bbox[2:]):
        yield f"bbox {shown_box(instance.bbox)} is empty"
    iou = instance.predicted_iou
    if iou is not None and not 0 <= iou <= 1:
        yield f"predicted_iou {iou:g} is not from 0 to 1"
    if instance.area is not None and not 0 <= instance.area < math.inf:
        yield f"area {instance.area:g} is not a number of pixels"
    if instance.prediction is not None:
        yield from _prediction_faults(instance.prediction, instance)
    if instance.segmentation is not None:
        yield from _mask_faults(instance.segmentation, instance.bbox, width, height)


def _prediction_faults(prediction: MaskPrediction, instance: Instance) -> Iterator[str]:
    if instance.segmentation is None:
        yield "mask_source is predicted, and there is no mask"
    if not 0 <= prediction.score <= 1:
        yield f"mask_score {prediction.score:g} is not from 0 to 1"
    if not prediction.run:
        yield "mask_run is empty: a predicted mask has the name of the run that predicted it"


def _mask_faults(mask: rle.Rle, bbox: Rectangle, width: int, height: int) -> Iterator[str]:
    if problem := rle.fault(mask, width, height):
        yield problem
    elif not rle.area(mask):
        yield "the RLE is empty: no pixel is the object's"
    elif not mask_fits(mask, bbox):
        yield f"the mask is at {shown_box(rle.bounds(mask))}, mostly outside its bbox {shown_box(bbox)}"


def mask_fits(mask: rle.Rle, bbox: Rectangle) -> bool:
    """Return whether a mask with at least one pixel is the object of a box: mostly inside it."""
    return _covered(rle.bounds(mask), bbox) >= COVERED


def _picture_faults(sample: Sample) -> Iterator[str]:
    name = sample.file_name
    try:
        width, height = image_size(sample.image, decode=False)
        if (width, height) != (sample.width, sample.height):
            yield f"{name} is {width}x{height}, {sample.image_id}.json says {sample.width}x{sample.height}"
        image_size(sample.image)
    except ImageError as error:
        yield f"{name} cannot be decoded: {one_line(error)}"


def _covered(mask: Rectangle, box: Rectangle) -> float:
    """Return the share of the first rectangle that is in the second plus margin; both x, y, w, h."""
    width = min(mask[0] + mask[2], box[0] + box[2] + MARGIN) - max(mask[0], box[0] - MARGIN)
    height = min(mask[1] + mask[3], box[1] + box[3] + MARGIN) - max(mask[1], box[1] - MARGIN)
    return max(width, 0.0) * max(height, 0.0) / (mask[2] * mask[3])
