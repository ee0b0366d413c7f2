"""Values on their way between the device and the host."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class HostCopy:
    """Tensors on their way to the host, so that the device can be given other work before they are read."""

    def __init__(self, *values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values[0].device.type == "cuda":
            pinned = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in values]
            self._values = tuple(host.copy_(one, non_blocking=True) for host, one in zip(pinned, values))
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values[0].device))

    def wait(self) -> tuple[Tensor, ...]:
        """Return the tensors on the host, after waiting for them if necessary."""
        if self._event is not None:
            self._event.synchronize()
        return tuple(one.cpu() for one in self._values)

    def read(self) -> list[Any]:
        """Return the values of a single tensor as nested lists, after waiting for them if necessary."""
        [single] = self.wait()
        values: list[Any] = single.tolist()
        return values


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Copy a small array to a device, without waiting for it."""
    tensor = torch.from_numpy(values)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
