"""How the detections of one image lie over its annotated objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from shards.format import rle
from shards.format.sample import Instance

if TYPE_CHECKING:
    from trainer.model.inference import Detections


@dataclass(frozen=True, slots=True)
class Overlaps:
    """N detections against M annotations of one image.

    Attributes:
        values: float64 (N, M), 0 to 1. Against an object intersection over union, against a group-of region
            intersection over the detection's own area; of masks where the annotation has one, else of boxes.
        labels: int64 (M,) category ids of the annotations.
        masked: bool (M,): the annotation has a mask with a pixel in it.
        groups: bool (M,): the annotation is a group-of region.
        empty: bool (N,): the detection's mask has no pixel.
    """

    values: NDArray[np.float64]
    labels: NDArray[np.int64]
    masked: NDArray[np.bool_]
    groups: NDArray[np.bool_]
    empty: NDArray[np.bool_]


def compute_overlaps(instances: Sequence[Instance], detections: Detections) -> Overlaps:
    """Compare by pycocotools, all pairs at once.

    A detection's box is its mask's extent, as in the official evaluation, whose submissions hold masks alone.
    """
    masks = [None if i.segmentation is None else i.segmentation.to_coco() for i in instances]
    found = [mask.to_coco() for mask in detections.masks]
    masked = np.array([i.segmentation is not None and rle.area(i.segmentation) > 0 for i in instances], dtype=np.bool_)
    groups = np.array([instance.is_group_of for instance in instances], dtype=np.bool_)
    values = np.zeros((len(found), len(masks)))
    if values.size:
        with_mask, without = np.flatnonzero(masked), np.flatnonzero(~masked)
        values[:, with_mask] = _compare(found, [masks[i] for i in with_mask], groups[with_mask])
        boxes = np.array([instances[i].bbox for i in without.tolist()], dtype=np.float64).reshape(-1, 4)
        values[:, without] = _compare(coco_mask.toBbox(found), boxes, groups[without])
    return Overlaps(
        values=values,
        labels=np.array([instance.category_id for instance in instances], dtype=np.int64),
        masked=masked,
        groups=groups,
        # One by one: of more than 255 masks, pycocotools' own `area` is an OverflowError under NumPy 2.
        empty=np.array([rle.area(mask) == 0 for mask in detections.masks], dtype=np.bool_),
    )


def pair(overlaps: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Row after row, the free column with the largest overlap of at least `threshold`; -1 where there is none.

    Args:
        overlaps: (N, M).
        threshold: above 0.
    """
    free = np.ones(overlaps.shape[1], dtype=np.bool_)
    paired = np.full(len(overlaps), -1, dtype=np.int64)
    for i, row in enumerate(overlaps):
        candidates = np.where(free & (row >= threshold), row, 0.0)
        if candidates.any():
            paired[i] = candidates.argmax()
            free[paired[i]] = False
    return paired


def _compare(found: Any, annotated: Any, groups: NDArray[np.bool_]) -> NDArray[np.float64]:
    """pycocotools' `iou` of masks, or of boxes x, y, w, h; an annotation that is a crowd is measured as a region is."""
    if not len(annotated):
        return np.zeros((len(found), 0))
    return np.asarray(coco_mask.iou(found, annotated, groups.astype(np.uint8).tolist()), dtype=np.float64)
