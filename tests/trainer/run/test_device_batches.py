"""Batches on the training device, without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shards.stream.loader import LoaderStatistics
from tests.trainer.batches import SCENES, batch_of
from trainer.data.instances import Batch
from trainer.run.device_batches import DeviceBatches


class Counted:
    """An endless loader of one batch, which counts."""

    def __init__(self) -> None:
        self.statistics = LoaderStatistics()
        self.bad_samples: list[Any] = []

    def __iter__(self) -> Iterator[Batch]:
        batch = batch_of(SCENES[:2])
        for number in itertools.count(1):
            self.statistics = LoaderStatistics(samples=2 * number)
            yield batch


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_take_returns_the_batches_of_a_step_and_what_was_loaded_for_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch.cuda.stream fails on a Mac, even without a stream, because torch.mps has no current_device.
    monkeypatch.setattr(torch._utils, "_get_available_device_type", lambda: kind)
    loader: Any = Counted()
    batches = DeviceBatches(loader, torch.device("cpu"), 3)
    for _ in range(2):
        taken, loaded, _ = batches.take()
        assert [len(batch) for batch in taken] == [2, 2, 2]
        assert loaded.samples == 6
        batches.prefetch()
