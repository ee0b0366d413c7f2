"""Batches on the training device, copied there while the step before them runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from shards.stream.loader import Loader, LoaderStatistics
from shards.stream.replacements import BadSample
from trainer.data.instances import Batch


class StepBatches(NamedTuple):
    """A step's batches, what the loader did for them, and the damaged samples that it met and replaced."""

    batches: list[Batch]
    loaded: LoaderStatistics
    bad_samples: list[BadSample]


class DeviceBatches:
    """The batches of a loader, a fixed number per step, on a device.

    On CUDA the next step's batches are copied on a stream of their own. A loop takes a step's batches, queues the
    step, and calls `prefetch`: so the device computes while the host waits for the loader.
    """

    def __init__(self, loader: Loader[Batch], device: torch.device, per_step: int) -> None:
        self._loader, self._batches = loader, iter(loader)
        self._device, self._per_step = device, per_step
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: StepBatches | None = None

    def take(self) -> StepBatches:
        """Return the next step's batches, and what the loader did for them."""
        taken, self._next = self._next or self._load(), None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in _tensors(taken.batches):
                tensor.record_stream(current)  # its memory is not reused before the step is done with it
        return taken

    def prefetch(self) -> None:
        """Start to copy the next batches to a CUDA device; on other devices they are loaded when they are taken."""
        if self._stream is not None:
            self._next = self._load()

    def _load(self) -> StepBatches:
        before, replaced = self._loader.statistics, len(self._loader.bad_samples)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batches = [next(self._batches).to(self._device) for _ in range(self._per_step)]
        return StepBatches(batches, self._loader.statistics.since(before), self._loader.bad_samples[replaced:])


def _tensors(batches: list[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        values = (getattr(batch, item.name) for item in fields(batch))
        yield from (value for value in values if isinstance(value, Tensor))
