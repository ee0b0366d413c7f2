"""What Open Images leaves open, as arithmetic on targets: which anchors, RoIs and logits are not taught.

- A group-of box stands over objects that nobody drew one by one. What lies in such a region and matches no object is
  neither positive nor negative.
- A class that is not verified in an image may be there without a box. Where nothing is drawn, its probability counts as
  background's there, so that nothing teaches its absence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# From this share of its own area on, a box lies in a region: the official metric ignores detections by the same rule.
SHARE = 0.5
_AT_ONCE = 16  # regions that are compared with all anchors at a time; 250,000 anchors take some 50 MB


def lie_in(boxes: Tensor, regions: Tensor) -> Tensor:
    """The boxes of which at least SHARE lies in one of the regions.

    Args:
        boxes: float32 [N, 4] x0, y0, x1, y1.
        regions: float32 [G, 4].

    Returns:
        bool [N].
    """
    needed = SHARE * (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    inside = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for some in regions.split(_AT_ONCE):
        across, down = (
            (torch.minimum(boxes[:, None, k + 2], some[:, k + 2]) - torch.maximum(boxes[:, None, k], some[:, k]))
            for k in (0, 1)
        )
        inside |= (across.clamp_(min=0) * down.clamp_(min=0) >= needed[:, None]).any(dim=1)
    return inside


def leave_out(labels: Tensor, boxes: Tensor, regions: Tensor) -> Tensor:
    """Labels for torchvision's samplers, with -1 (neither positive nor negative) for the background in regions.

    What matches an object stays positive, wherever it lies: the object was drawn.

    Args:
        labels: [N] of anchors or proposals: above 0 positive, 0 negative, -1 left out already.
        boxes: float32 [N, 4], theirs.
        regions: float32 [G, 4] of the image.
    """
    if len(regions) == 0:
        return labels
    return labels.masked_fill((labels == 0) & lie_in(boxes, regions), -1)


def verified_table(verified: Sequence[Sequence[int] | None], classes: int) -> Tensor | None:
    """Of which classes each image tells whether they are there.

    Args:
        verified: for each image the ids of the verified classes, None for all.
        classes: number of logits; 0 is the background, which is always true.

    Returns:
        bool [B, classes] on the host; None when it would be all true.
    """
    table = torch.ones((len(verified), classes), dtype=torch.bool)
    for row, known in zip(table, verified):
        if known is not None:
            row[1:] = False
            row[list(known)] = True
    return None if bool(table.all()) else table


def join_unverified(logits: Tensor, labels: Sequence[Tensor], table: Tensor) -> Tensor:
    """Logits whose cross-entropy lets background be "background, or a class that is not verified in the image".

    A RoI that matches no drawn object shows background, or an object of a class whose objects nobody drew there. Its
    loss is -log of the probability of all of these together, so that nothing pulls the unverified classes down
    (Cermelli et al., "Modeling the Background", CVPR 2020, for classes that a training set does not label). A RoI that
    matches a drawn object is of that class and no other, verified or not: its softmax is the plain one.

    Args:
        logits: float [R, C] of all images' RoIs, in their order; column 0 is the background.
        labels: int64 [R_i] of each image.
        table: bool [B, C], see `verified_table`.

    Returns:
        float [R, C]: for background in images with unverified classes, column 0 is the log-sum-exp of its own logit and
        theirs, which are -inf.
    """
    counts = torch.tensor([len(of_image) for of_image in labels])
    unverified = (~table).repeat_interleave(counts, dim=0).to(logits.device, non_blocking=True)
    unverified &= (torch.cat(list(labels)) == 0)[:, None]
    either = unverified.clone()
    either[:, 0] = True
    background = torch.logsumexp(logits.masked_fill(~either, -torch.inf), dim=1, keepdim=True)
    return torch.cat((background, logits.masked_fill(unverified, -torch.inf)[:, 1:]), dim=1)
