"""The optimizer of a stage, and the average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from trainer.config.settings import OptimConfig


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters of `model` that train.

    Without `decay_norms`, those of one dimension (biases, and scale and shift of normalisation) are in a group of
    their own that does not decay.
    """
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": training}]
    if not optim.decay_norms:
        groups = [
            {"params": [parameter for parameter in training if parameter.ndim > 1]},
            {"params": [parameter for parameter in training if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
    if optim.optimizer == "adamw":
        b1, b2 = optim.betas
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(b1, b2), weight_decay=optim.weight_decay)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def averaged(network: nn.Module, decay: float, steps: int) -> AveragedModel:
    """An exponential moving average of a network's weights and buffers; `update_parameters(network)` after each step.

    The decay of step n is at most (1 + n) / (10 + n), so that the initial weights are soon forgotten (as in
    TensorFlow's `ExponentialMovingAverage`).

    Args:
        network: copied; a run that continues then loads what it had saved into `module`.
        decay: above 0, at most 1.
        steps: steps done.
    """

    def update(own: Sequence[Tensor], theirs: Sequence[Tensor], number: Tensor | int) -> None:
        n = int(number)
        share = 1 - min(decay, (1 + n) / (10 + n))
        for mine, other in zip(own, theirs):
            if mine.is_floating_point():
                mine.lerp_(other.to(mine), share)
            else:  # batch norm's counter
                mine.copy_(other)

    average = AveragedModel(network, multi_avg_fn=update, use_buffers=True)
    average.n_averaged.fill_(steps)
    return average.eval()
