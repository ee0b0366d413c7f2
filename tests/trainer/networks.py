"""Small networks for tests of the model."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from trainer.config.settings import ModelConfig

Module = TypeVar("Module", bound=nn.Module)


def narrow(**changes: Any) -> ModelConfig:
    """Settings of a ResNet-18 with narrow heads and random weights."""
    values: dict[str, Any] = {"backbone": "resnet18", "norm": "batch", "weights": "none", "mask_head_channels": [8]}
    return ModelConfig(**{**values, "fpn_channels": 8, "box_head_features": 8, **changes})


def with_statistics(network: Module, lowest: float = 0.5) -> Module:
    """Give norms random statistics that keep activations at an ordinary size; variances are at least `lowest`."""
    rng = torch.Generator().manual_seed(1)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=rng) + lowest)
        elif name.endswith("running_mean"):
            value.copy_(torch.rand(value.shape, generator=rng) * 0.1)
    return network
