"""Anchors, and proposals: the best-scored anchors of each level, moved, without those that overlap better ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork

from trainer.step.boxes import decode, take
from trainer.step.nms import nms_keep

STRIDES = (4, 8, 16, 32, 64)  # of the five maps


class Anchors(NamedTuple):
    """The anchors of one image, the same for every image of a batch.

    Attributes:
        boxes: float32 [A, 4] x0, y0, x1, y1 in pixels, level after level.
        per_level: number of anchors of each level; their sum is A.
    """

    boxes: Tensor
    per_level: tuple[int, ...]


def anchors_of(generator: AnchorGenerator, height: int, width: int, device: torch.device) -> Anchors:
    """Return torchvision's anchors of an input of `height` x `width` pixels.

    They are float32 under autocast as well: in bfloat16, anchors beyond pixel 512 would be rounded to four pixels.
    """
    sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]
    maps = [torch.empty((1, 1, *size), device=device) for size in sizes]
    image = ImageList(torch.empty((1, 3, height, width), device="meta"), [(height, width)])
    per_location = generator.num_anchors_per_location()
    counts = tuple(rows * columns * count for (rows, columns), count in zip(sizes, per_location))
    return Anchors(generator(image, maps)[0], counts)


class Proposals(NamedTuple):
    """The proposals of a batch, in descending order of score.

    Attributes:
        boxes: float32 [B, P, 4] x0, y0, x1, y1 in pixels; inside the images, whatever the network predicts.
        valid: bool [B, P]; false where an image has fewer.
    """

    boxes: Tensor
    valid: Tensor


def flatten_levels(objectness: list[Tensor], deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Join the RPN head's maps, [B, K, h, w] and [B, 4 K, h, w] per level, in the order of the anchors.

    Returns:
        float32 [B, A] logits and [B, A, 4] deltas.
    """
    logits = torch.cat([of_level.permute(0, 2, 3, 1).flatten(1) for of_level in objectness], dim=1)
    joined = torch.cat([of_level.permute(0, 2, 3, 1).flatten(1) for of_level in deltas], dim=1)
    return logits.float(), joined.float().unflatten(1, (-1, 4))


def proposal_slots(rpn: RegionProposalNetwork, anchors: Anchors) -> int:
    """Return the number of proposals of an image, P."""
    before, after = int(rpn.pre_nms_top_n()), int(rpn.post_nms_top_n())
    return min(after, sum(min(before, count) for count in anchors.per_level))


def propose(rpn: RegionProposalNetwork, anchors: Anchors, logits: Tensor, deltas: Tensor, sizes: Tensor) -> Proposals:
    """Choose proposals as `RegionProposalNetwork.filter_proposals` does.

    Args:
        rpn: its numbers of proposals and thresholds are used.
        anchors: of the input's shape.
        logits: float32 [B, A].
        deltas: float32 [B, A, 4].
        sizes: int64 [B, 2], height and width of each image, to which the proposals are clipped.
    """
    index, counts, start = [], [], 0
    for level in logits.split(anchors.per_level, dim=1):
        counts.append(min(rpn.pre_nms_top_n(), level.shape[1]))
        index.append(level.topk(counts[-1], dim=1).indices + start)
        start += level.shape[1]
    best = torch.cat(index, dim=1)  # [B, N]
    boxes = decode(rpn.box_coder, take(deltas, best), anchors.boxes[best])  # [B, N, 4]
    boxes = torch.minimum(boxes.clamp(min=0), sizes.flip(1).repeat(1, 2)[:, None])
    scores = take(logits, best).sigmoid()
    valid = ((boxes[..., 2:] - boxes[..., :2]) >= rpn.min_size).all(dim=-1) & (scores >= rpn.score_thresh)
    boxes = boxes.masked_fill(~valid[..., None], 0)  # may be NaN, at which torchvision's roi_align crashes on a CPU
    keep = nms_keep(boxes, scores, valid, counts, rpn.nms_thresh)
    ranked = scores.masked_fill(~keep, -1).sort(dim=1, descending=True, stable=True)
    count = proposal_slots(rpn, anchors)
    return Proposals(take(boxes, ranked.indices[:, :count]), ranked.values[:, :count] >= 0)
