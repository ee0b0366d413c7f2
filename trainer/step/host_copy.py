"""Values on their way from the device to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A small tensor on its way to the host, so that the device can be given other work before it is read."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Any]:
        """Return the values as nested lists, after waiting for them if necessary."""
        if self._event is not None:
            self._event.synchronize()
        values: list[Any] = self._values.tolist()
        return values


def to_device(numbers: list[float], device: torch.device) -> Tensor:
    """Return numbers as float32 on a device, without waiting for it."""
    values = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
    return values.to(device, non_blocking=True)
