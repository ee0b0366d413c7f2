"""What the ranks report to each other in every step: losses, what their loaders did, memory, and a signal."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from shards.stream.loader import LoaderStatistics
    from trainer.config.settings import LossConfig
    from trainer.data.instances import Batch

    Losses = Mapping[str, Tensor]  # by name; scalars

COUNTS = ("requests", "retries", "samples", "cache_hits")  # fields of `LoaderStatistics` and `StepReport` that add up


@dataclass(frozen=True)
class StepReport:
    """One rank's part of a step."""

    losses: dict[str, float]  # mean of each loss over the rank's batches
    data_wait_s: float  # waiting for its batches
    read_mb: float  # 10^6 bytes that its loader read from storage
    requests: int  # to storage
    retries: int  # requests that were repeated
    samples: int  # in its batches
    cache_hits: int  # samples that came from the cache
    memory_mb: float  # see `peak_memory_mb`
    signal: int  # number of the signal that the rank received; 0 for none


def exchange(
    accelerator: Accelerator, losses: Sequence[Losses], loaded: LoaderStatistics, signal: int
) -> list[StepReport]:
    """Share what this rank reports, in one collective operation; return the reports of all ranks, in their order.

    Args:
        losses: of each batch of this rank.
        loaded: what this rank's loader did for these batches.
        signal: number of the signal that this rank received; 0 for none.
    """
    import torch

    means = torch.stack([torch.stack([loss.float() for loss in each.values()]) for each in losses]).mean(0)  # [losses]
    numbers = {
        "data_wait_s": loaded.waited_s,
        "read_mb": loaded.nbytes / 1e6,
        **{name: getattr(loaded, name) for name in COUNTS},
        "memory_mb": peak_memory_mb(accelerator.device),
        "signal": signal,
    }
    own = torch.cat((means, means.new_tensor(list(numbers.values()))))  # [losses + numbers]
    reports = []
    for row in accelerator.gather(own[None]).tolist():  # [ranks, losses + numbers]
        values: dict[str, Any] = dict(zip([*losses[0], *numbers], row, strict=True))
        values |= {name: int(values[name]) for name in (*COUNTS, "signal")}
        reports.append(StepReport({name: values.pop(name) for name in losses[0]}, **values))
    return reports


def nonfinite_losses(reports: Sequence[StepReport], losses: Sequence[Losses], batches: Sequence[Batch]) -> str:
    """Return which losses are not finite, on which ranks and samples; empty if all are. `reports` are of all ranks."""
    bad = [
        (rank, name, value)
        for rank, report in enumerate(reports)
        for name, value in report.losses.items()
        if not math.isfinite(value)
    ]
    if not bad:
        return ""
    from accelerate.utils import gather_object

    own = [
        image_id
        for batch, each in zip(batches, losses, strict=True)
        if not all(loss.isfinite() for loss in each.values())
        for image_id in batch.image_ids
    ]
    image_ids = gather_object([own])
    where = ", ".join(f"{name} is {value} on rank {rank}" for rank, name, value in bad)
    samples = ", ".join(image_id for rank in sorted({rank for rank, _, _ in bad}) for image_id in image_ids[rank])
    return f"{where} (samples {samples})"


def mean_losses(reports: Sequence[StepReport]) -> dict[str, float]:
    """Return each loss, averaged over the ranks."""
    return {name: sum(report.losses[name] for report in reports) / len(reports) for name in reports[0].losses}


def loading(reports: Sequence[StepReport]) -> dict[str, Any]:
    """Return what the loaders of all ranks did, and the largest memory of a rank, as a step's row of metrics.jsonl."""
    waits = [report.data_wait_s for report in reports]
    return {
        "data_wait_s": sum(waits) / len(waits),
        "data_wait_longest_s": max(waits),
        "read_mb": round(sum(report.read_mb for report in reports), 6),
        **{name: sum(getattr(report, name) for report in reports) for name in COUNTS},
        "memory_mb": max(report.memory_mb for report in reports),
    }


def peak_memory_mb(device: torch.device) -> float:
    """Return the largest memory in 10^6 bytes that this rank has used: of its GPU, or of its process without one."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def weighted_sum(losses: Mapping[str, Any], weights: LossConfig) -> Any:
    """Return the sum of the losses, each times its weight: tensors or numbers."""
    return sum(getattr(weights, name.removeprefix("loss_")) * loss for name, loss in losses.items())
