"""Which annotated object each anchor or proposal belongs to, and which of them train.

Those that train are chosen by random keys: the smallest keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher

from trainer.step.boxes import CHUNK_BYTES, area, intersection
from trainer.step.ground_truth import GroundTruth

MIN_SHARE = 0.5  # of a box's area inside the image; the official metric ignores detections by the same rule

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


class Matches(NamedTuple):
    """The matches of N boxes of every image.

    Attributes:
        role: int8 [B, N] POSITIVE, NEGATIVE or IGNORED.
        objects: int64 [B, N] the object with the largest IoU, whatever the role.
    """

    role: Tensor
    objects: Tensor


def match(matcher: Matcher, truth: GroundTruth, boxes: Tensor, inside: Tensor) -> Matches:
    """Match boxes to objects as torchvision's `Matcher`, and ignore negative ones in regions.

    A box that matches an object stays positive in a region, because that object is annotated. An image without objects
    has negative boxes only. A region ends with the image, so only the part of a box inside the image is compared with
    it; a box without such a part, in the padding, is in no region. The objects are compared a few at a time, so that no
    table exceeds CHUNK_BYTES.

    Args:
        matcher: its thresholds, and whether the best box of every object is positive.
        truth: objects and regions of each image.
        boxes: float32 [B, N, 4], or [1, N, 4] for the same boxes in every image.
        inside: float32 [B, N], the area of each box's part inside its image.
    """
    (images, count), boxes_per_image = truth.labels.shape, boxes.shape[1]
    best = boxes.new_full((images, boxes_per_image), -1)
    objects = torch.zeros_like(best, dtype=torch.int64)
    is_best, in_region = torch.zeros_like(best, dtype=torch.bool), torch.zeros_like(best, dtype=torch.bool)
    needed = MIN_SHARE * inside
    needed = needed.masked_fill_(needed == 0, torch.inf)
    at_a_time = max(1, CHUNK_BYTES // (4 * images * boxes_per_image))
    for start in range(0, count, at_a_time):
        some, is_object, is_region = (part[:, start : start + at_a_time] for part in truth.rows())
        shared = intersection(some, boxes)  # [B, g, N]
        in_region = in_region | ((shared >= needed[:, None]) & is_region[:, :, None]).any(dim=1)
        union = area(some)[:, :, None] + area(boxes)[:, None] - shared
        iou = (shared / union).masked_fill_(~is_object[:, :, None], -1)
        if matcher.allow_low_quality_matches:
            # Compared within one table: a compiler that computed the IoU twice could find two values that differ in
            # their last bit.
            is_best = is_best | ((iou == iou.amax(dim=2, keepdim=True)) & is_object[:, :, None]).any(dim=1)
        largest, index = iou.max(dim=1)  # [B, N]
        objects = torch.where(largest > best, index + start, objects)
        best = torch.maximum(best, largest)
    is_positive = is_best | (best >= matcher.high_threshold)
    is_ignored = (in_region | (best >= matcher.low_threshold)) & ~is_positive
    return Matches(is_positive.to(torch.int8) - is_ignored.to(torch.int8), objects)


class Sample(NamedTuple):
    """The chosen entries of every image, positive ones first.

    Attributes:
        entries: int64 [B, S], indices into the N entries of an image.
        is_positive: bool [B, S].
        is_used: bool [B, S]; false where an image has fewer to choose from.
    """

    entries: Tensor
    is_positive: Tensor
    is_used: Tensor


def positive_slots(sampler: BalancedPositiveNegativeSampler) -> int:
    """Return the largest number of positive entries of an image."""
    return int(sampler.batch_size_per_image * sampler.positive_fraction)


def sample(sampler: BalancedPositiveNegativeSampler, role: Tensor, keys: Tensor) -> Sample:
    """Choose as torchvision's sampler: positive entries up to their share, then negative ones up to the whole size.

    Args:
        sampler: its size and share are used.
        role: int8 [B, N] POSITIVE, NEGATIVE or IGNORED.
        keys: float32 [B, N], uniform in [0, 1).
    """
    size = min(sampler.batch_size_per_image, role.shape[1])
    most = min(positive_slots(sampler), size)
    is_positive, is_negative = role == POSITIVE, role == NEGATIVE
    positives = is_positive.sum(dim=1, keepdim=True).clamp(max=most)  # [B, 1]
    negatives = torch.minimum(is_negative.sum(dim=1, keepdim=True), sampler.batch_size_per_image - positives)
    slot = torch.arange(size, device=role.device)[None]  # [1, S]
    first = keys.masked_fill(~is_negative, 2).topk(size, dim=1, largest=False).indices  # [B, S] negative ones
    if most:
        chosen = keys.masked_fill(~is_positive, 2).topk(most, dim=1, largest=False).indices  # [B, P]
        # After the positive entries, however many these are, the negative ones from their first on.
        own = chosen.gather(1, slot.clamp(max=most - 1).expand(len(role), -1))
        others = first.gather(1, (slot - positives).clamp(min=0))
        first = torch.where(slot < positives, own, others)
    return Sample(first, slot < positives, slot < positives + negatives)
