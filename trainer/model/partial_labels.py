"""Training targets under the incomplete annotations of Open Images.

- A group-of box covers objects that were not annotated one by one. An anchor or RoI in such a region that matches no
  object is ignored: neither positive nor negative.
- A class that is not verified in an image may be present without a box. Where no object is annotated, its probability
  is added to that of the background, so that its absence is not taught.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_SHARE = 0.5  # of its own area in a region; the official metric ignores detections by the same rule
_REGIONS_AT_A_TIME = 16  # bounds the memory: about 50 MB with 250,000 anchors


def are_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """Return which boxes have at least MIN_SHARE of their area inside one of the regions, bool [N].

    Boxes, float32 [N, 4], and regions, float32 [G, 4], are x0, y0, x1, y1.
    """
    needed = MIN_SHARE * (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    inside = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for some in regions.split(_REGIONS_AT_A_TIME):
        across, down = (
            (torch.minimum(boxes[:, None, k + 2], some[:, k + 2]) - torch.maximum(boxes[:, None, k], some[:, k]))
            for k in (0, 1)
        )  # [N, G] each
        inside |= (across.clamp_(min=0) * down.clamp_(min=0) >= needed[:, None]).any(dim=1)
    return inside


def ignore_regions(labels: Tensor, boxes: Tensor, regions: Tensor) -> Tensor:
    """Set the labels of background in regions to -1, which torchvision's samplers ignore.

    A box that matches an object stays positive even in a region, because that object is annotated. `labels`, [N], are
    above 0 for positive anchors or proposals, 0 for negative ones, and -1 for those that are ignored already.
    """
    if len(regions) == 0:
        return labels
    return labels.masked_fill((labels == 0) & are_inside(boxes, regions), -1)


def verified_table(verified: Sequence[Sequence[int] | None], classes: int) -> Tensor | None:
    """Return which classes are verified in each image, bool [B, classes]; None if all are in all images.

    `verified` has the ids of an image's verified classes, None for all. Class 0, the background, counts as verified.
    """
    table = torch.ones((len(verified), classes), dtype=torch.bool)
    for row, known in zip(table, verified):
        if known is not None:
            row[1:] = False
            row[list(known)] = True
    return None if bool(table.all()) else table


def merge_unverified(logits: Tensor, labels: Sequence[Tensor], table: Tensor) -> Tensor:
    """Merge the unverified classes of each image into the background of its background RoIs.

    A RoI that matches no annotated object shows background, or an object of an unverified class. The cross-entropy of
    the merged logits is -log of the probability of all of these together, so it does not lower the unverified classes
    (Cermelli et al., "Modeling the Background", CVPR 2020, for classes that a training set does not label). The logits
    of a RoI that matches an annotated object stay as they are, because its class is known.

    Args:
        logits: float [R, C] of all images' RoIs, in their order; column 0 is the background.
        labels: int64 [R_i] of each image.
        table: bool [B, C], see `verified_table`.

    Returns:
        float [R, C]: column 0 of background RoIs is the log-sum-exp over the background and the unverified classes,
        whose own columns are -inf.
    """
    counts = torch.tensor([len(of_image) for of_image in labels])
    unverified = (~table).repeat_interleave(counts, dim=0).to(logits.device, non_blocking=True)  # [R, C]
    unverified &= (torch.cat(list(labels)) == 0)[:, None]
    merged = unverified.clone()
    merged[:, 0] = True
    background = torch.logsumexp(logits.masked_fill(~merged, -torch.inf), dim=1, keepdim=True)  # [R, 1]
    return torch.cat((background, logits.masked_fill(unverified, -torch.inf)[:, 1:]), dim=1)
