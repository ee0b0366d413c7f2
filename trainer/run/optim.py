"""The optimizer of a stage, and the average of the weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from trainer.config.settings import OptimConfig

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer

Module = TypeVar("Module", bound=nn.Module)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return SGD or AdamW over the trainable parameters of `model`, in the form that `apply_update` can skip.

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
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(b1, b2), weight_decay=optim.weight_decay, fused=True)
    sgd = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True)
    if optim.momentum:
        # torch creates them in the first update, and leaves them uninitialised if that one is skipped.
        for parameter in trainable:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def load_state(optimizer: AcceleratedOptimizer, saved: dict[str, Any]) -> None:
    """Load the state of a checkpoint, such as momentum, into a new optimizer, whose settings stay.

    A fused kernel reads parameter and state in the order of the parameter's memory. Saved tensors are contiguous, so
    they are copied to the memory format of the parameter: otherwise CUDA raises an error, and a CPU mixes them up.

    Args:
        optimizer: as `make_optimizer` made it.
        saved: a state_dict; what it lacks stays as it is.
    """
    new = optimizer.state_dict()
    state = dict(new["state"])
    for number, entries in saved["state"].items():
        state[number] = {**state.get(number, {}), **{name: v for name, v in entries.items() if v is not None}}
    optimizer.load_state_dict({"state": state, "param_groups": new["param_groups"]})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def mark_nonfinite(model: nn.Module, losses: Tensor) -> None:
    """Make the gradient of `model` NaN if a loss is not finite, without reading it.

    So that the norm of the gradient, and fp16's gradient scaler, show every step that must not be done.
    """
    gradient = next(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    gradient.add_((losses * 0).sum().to(gradient.dtype))  # infinity times 0 is NaN


def apply_update(optimizer: AcceleratedOptimizer, is_done: Tensor) -> None:
    """Update the weights if `is_done`, a bool scalar on the device, which the optimizer's kernels read there.

    The gradient scaler of fp16 decides by itself, from the same gradients.
    """
    if optimizer.scaler is not None:
        optimizer.step()
        return
    inner = optimizer.optimizer
    inner.found_inf, inner.grad_scale = (~is_done).float(), None  # what torch's own gradient scaler sets
    try:
        optimizer.step()
    finally:
        del inner.found_inf, inner.grad_scale


def frozen_copy(network: Module) -> Module:
    """Return a copy of a network in evaluation mode, without gradients."""
    return copy.deepcopy(network).eval().requires_grad_(False)


class MovingAverage:
    """The exponential moving average of a network's weights and buffers.

    The decay of step n is at most (1 + n) / (10 + n), so that the initial weights lose their influence quickly (as in
    TensorFlow's `ExponentialMovingAverage`).

    Attributes:
        module: a copy of the network with the average, in evaluation mode; a resumed run loads its saved average.
    """

    def __init__(self, network: Module, decay: float, steps: int) -> None:
        """Begin with the network's own weights, after `steps` steps."""
        self.module = frozen_copy(network)
        self.decay = decay
        self._steps = torch.tensor(float(steps), device=next(network.parameters()).device)

    @torch.no_grad()
    def update(self, network: nn.Module, is_done: Tensor) -> None:
        """Include the weights after a step, if it was done: a bool scalar on the device, which is not read."""
        decay = ((1 + self._steps) / (10 + self._steps)).clamp(max=self.decay)
        share = (1 - decay).masked_fill(self._steps == 0, 1) * is_done
        self._steps += is_done
        averages, values = (n.state_dict(keep_vars=True).values() for n in (self.module, network))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average), share)
            else:  # the counter of a batch norm
                average.copy_(value)
