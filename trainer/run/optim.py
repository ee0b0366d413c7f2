"""The optimizer of a stage, and the average of the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from trainer.config.settings import OptimConfig


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return SGD or AdamW over the trainable parameters of `model`.

    Without `decay_norms`, parameters of one dimension (biases, and scale and shift of normalisation) have no decay.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trainable}]
    if not optim.decay_norms:
        groups = [
            {"params": [parameter for parameter in trainable if parameter.ndim > 1]},
            {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
    if optim.optimizer == "adamw":
        b1, b2 = optim.betas
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(b1, b2), weight_decay=optim.weight_decay)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def averaged(network: nn.Module, decay: float, steps: int) -> AveragedModel:
    """Return the exponential moving average of a network's weights and buffers after a number of steps.

    Call `update_parameters(network)` after each step. The decay of step n is at most (1 + n) / (10 + n), so that the
    initial weights lose their influence quickly (as in TensorFlow's `ExponentialMovingAverage`). The network is copied;
    a resumed run loads its saved average into `module`.
    """

    def update(averages: Sequence[Tensor], values: Sequence[Tensor], number: Tensor | int) -> None:
        n = int(number)
        share = 1 - min(decay, (1 + n) / (10 + n))
        for average, value in zip(averages, values):
            if average.is_floating_point():
                average.lerp_(value.to(average), share)
            else:  # the counter of a batch norm
                average.copy_(value)

    average = AveragedModel(network, multi_avg_fn=update, use_buffers=True)
    average.n_averaged.fill_(steps)
    return average.eval()
