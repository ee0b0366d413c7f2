"""The five losses of Mask R-CNN as weighted sums over slots, some of which are not used.

With the same anchors and RoIs they are torchvision's. A mean over nothing is 0, and still depends on the parameters,
as DDP requires.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 1 / 9  # where smooth L1 turns from quadratic to linear, as in torchvision


def mean_of(values: Tensor, is_used: Tensor) -> Tensor:
    """Return the mean of the used values, a scalar; 0 if none is."""
    return values.masked_fill(~is_used, 0).sum() / is_used.sum().clamp(min=1)


def objectness_loss(logits: Tensor, is_positive: Tensor, is_used: Tensor) -> Tensor:
    """Return binary cross-entropy, averaged over the used anchors; float32 and bool [B, S]."""
    losses = F.binary_cross_entropy_with_logits(logits, is_positive.to(logits), reduction="none")
    return mean_of(losses, is_used)


def box_loss(deltas: Tensor, targets: Tensor, is_positive: Tensor, is_used: Tensor) -> Tensor:
    """Return smooth L1 of positive boxes, summed over coordinates and divided by the number of used boxes.

    Args:
        deltas: float32 [..., 4], predicted.
        targets: float32 [..., 4]; those of boxes that are not positive are not read.
        is_positive: bool [...].
        is_used: bool, any shape: of all chosen boxes, negative ones too.
    """
    targets = targets.masked_fill(~is_positive[..., None], 0)  # may be infinite
    losses = F.smooth_l1_loss(deltas, targets, beta=BETA, reduction="none").sum(dim=-1)
    return losses.masked_fill(~is_positive, 0).sum() / is_used.sum().clamp(min=1)


def class_loss(logits: Tensor, labels: Tensor, is_used: Tensor) -> Tensor:
    """Return cross-entropy, averaged over the used RoIs: float32 [K, C], int64 [K] and bool [K]."""
    return mean_of(F.cross_entropy(logits, labels, reduction="none"), is_used)


def merge_unverified(logits: Tensor, labels: Tensor, verified: Tensor) -> Tensor:
    """Merge the unverified classes into the background of background RoIs.

    A class that is not verified in an image may be there without a box: a RoI that matches no annotated object shows
    background, or an object of an unverified class. The cross-entropy of the merged logits is -log of the probability
    of all of these together, so it does not lower the unverified classes (Cermelli et al., "Modeling the Background",
    CVPR 2020, for classes that a training set does not label). The logits of a RoI that matches an annotated object
    stay as they are, because its class is known.

    Args:
        logits: float32 [K, C]; column 0 is the background.
        labels: int64 [K], 0 for background RoIs.
        verified: bool [K, C], the verified classes of each RoI's image; column 0 is not read.

    Returns:
        float32 [K, C]: column 0 of background RoIs is the log-sum-exp over the background and the unverified classes,
        whose own columns are -inf.
    """
    background, classes = logits[:, :1], logits[:, 1:]
    merged = ~verified[:, 1:] & (labels == 0)[:, None]  # [K, C - 1]
    possible = torch.cat((background, classes.masked_fill(~merged, -torch.inf)), dim=1)
    known = classes.masked_fill(merged, -torch.inf)
    return torch.cat((possible.logsumexp(dim=1, keepdim=True), known), dim=1)


def mask_loss(
    logits: Tensor, labels: Tensor, targets: Tensor, is_used: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return binary cross-entropy of each RoI's mask for its own class, averaged over used RoIs and pixels.

    Args:
        logits: float32 [K, C, S, S].
        labels: int64 [K].
        targets: float32 [K, S, S], 0 to 1.
        is_used: bool [K].
        weights: float32 [K], factors on the losses of RoIs; None for 1.
    """
    own = of_label(logits, labels)
    losses = F.binary_cross_entropy_with_logits(own, targets, reduction="none").mean(dim=(1, 2))
    return mean_of(losses if weights is None else losses * weights, is_used)


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    """Return the entry of each row's label: [K, C, ...] at int64 [K] is [K, ...]."""
    index = labels.view(-1, *[1] * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index)[:, 0]
