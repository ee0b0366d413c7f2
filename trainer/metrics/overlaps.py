"""Overlaps of the detections in an image with its annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from shards.format import rle
from shards.format.sample import Instance, Sample

if TYPE_CHECKING:
    from trainer.model.inference import Detections


@dataclass(frozen=True, slots=True)
class Overlaps:
    """N detections compared with M annotations of one image.

    Attributes:
        values: float64 [N, M], 0 to 1. Of an object, intersection over union; of a group-of region, intersection over
            the detection's area. Of masks where the annotation has one, else of boxes.
        labels: int64 [M] category ids of the annotations.
        masked: bool [M], whether the annotation has a mask of at least one pixel.
        groups: bool [M], whether the annotation is a group-of region.
        empty: bool [N], whether the detection's mask has no pixel.
    """

    values: NDArray[np.float64]
    labels: NDArray[np.int64]
    masked: NDArray[np.bool_]
    groups: NDArray[np.bool_]
    empty: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class EvaluatedImage:
    """One image with its detections, in pixels of the image as stored.

    `sample` is the truth: a predicted mask is none, and its object here is one with a box only.
    """

    sample: Sample
    detections: Detections

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample", self.sample.without_predictions())

    @cached_property
    def overlaps(self) -> Overlaps:
        """Overlaps of the detections with the annotations, computed once for all metrics."""
        return compute_overlaps(self.sample.instances, self.detections)


def compute_overlaps(instances: Sequence[Instance], detections: Detections) -> Overlaps:
    """Compute the overlaps of all pairs; a detection's box is the extent of its mask, as Open Images evaluates it."""
    masks = [None if i.segmentation is None else i.segmentation.to_coco() for i in instances]
    found = [mask.to_coco() for mask in detections.masks]
    masked = np.array([i.segmentation is not None and rle.area(i.segmentation) > 0 for i in instances], dtype=np.bool_)
    groups = np.array([instance.is_group_of for instance in instances], dtype=np.bool_)
    values = np.zeros((len(found), len(masks)))
    if values.size:
        with_mask, without = np.flatnonzero(masked), np.flatnonzero(~masked)
        values[:, with_mask] = compute_iou(found, [masks[i] for i in with_mask], groups[with_mask])
        boxes = np.array([instances[i].bbox for i in without.tolist()], dtype=np.float64).reshape(-1, 4)
        values[:, without] = compute_iou(coco_mask.toBbox(found), boxes, groups[without])
    return Overlaps(
        values=values,
        labels=np.array([instance.category_id for instance in instances], dtype=np.int64),
        masked=masked,
        groups=groups,
        # One by one: for more than 255 masks, pycocotools' `area` raises an OverflowError under NumPy 2.
        empty=np.array([rle.area(mask) == 0 for mask in detections.masks], dtype=np.bool_),
    )


def compute_iou(found: Any, annotated: Any, groups: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Return pycocotools' IoU, float64 [N, M], of masks as COCO's RLE or of boxes x, y, w, h.

    For annotations in `groups`, bool [M], the intersection is divided by the area of `found` alone.
    """
    if not len(found) or not len(annotated):
        return np.zeros((len(found), len(annotated)))
    crowds = [0] * len(annotated) if groups is None else groups.astype(np.uint8).tolist()
    return np.asarray(coco_mask.iou(found, annotated, crowds), dtype=np.float64)


def match_greedily(overlaps: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Match each row of overlaps [N, M], in order, with the free column that it overlaps most, -1 below `threshold`."""
    free = np.ones(overlaps.shape[1], dtype=np.bool_)
    matched = np.full(len(overlaps), -1, dtype=np.int64)
    for i, row in enumerate(overlaps):
        candidates = np.where(free & (row >= threshold), row, 0.0)
        if candidates.any():
            matched[i] = candidates.argmax()
            free[matched[i]] = False
    return matched
