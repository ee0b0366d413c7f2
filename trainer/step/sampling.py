"""Random choice of the anchors and RoIs that train, by random keys: the smallest keys are chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from trainer.step.matching import NEGATIVE, POSITIVE


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
