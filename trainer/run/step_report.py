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
    from shards.stream.replacements import BadSample
    from trainer.config.settings import LossConfig

    Losses = Mapping[str, Tensor]  # by name; scalars

# Fields of `StepReport` besides the losses, in the order in which ranks exchange them.
NUMBERS = ("data_wait_s", "read_mb", "requests", "retries", "samples", "cache_hits", "memory_mb", "signal", "replaced")
COUNTS = ("requests", "retries", "samples", "cache_hits")  # fields of `StepReport` that add up


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
    replaced: int = 0  # damaged samples that its loader replaced


@dataclass(frozen=True)
class StepResult:
    """What a step came to, the same on every rank.

    Attributes:
        reports: of all ranks, in their order.
        grad_norm: of the gradient of all parameters, averaged over the ranks, before clipping.
        problem: which losses, or that the gradient, are not finite; empty if all are, and the step was done.
        bad_samples: that the loaders replaced.
    """

    reports: list[StepReport]
    grad_norm: float
    problem: str
    bad_samples: Sequence[BadSample] = ()

    @property
    def losses(self) -> dict[str, float]:
        """Each loss, averaged over the ranks."""
        names, count = self.reports[0].losses, len(self.reports)
        return {name: sum(report.losses[name] for report in self.reports) / count for name in names}

    @property
    def signal(self) -> int:
        """Number of a signal that any rank received; 0 for none."""
        return max(report.signal for report in self.reports)


class PendingStep:
    """The result of a step, on its way to the host while the device may compute the next step.

    Args:
        gathered: what `exchange` returned.
        norm: of the gradient, a scalar on the device.
        losses: of each batch of this rank.
        image_ids: of each batch of this rank.
        row: what the host knows of the step's row of metrics.jsonl.
        bad_samples: that this rank's loader replaced.
    """

    def __init__(
        self,
        gathered: Tensor,
        norm: Tensor,
        losses: Sequence[Losses],
        image_ids: Sequence[Sequence[str]],
        row: dict[str, Any],
        bad_samples: Sequence[BadSample] = (),
    ) -> None:
        from trainer.step.host_copy import HostCopy  # not at the top: --help answers without torch

        self.row = row
        self._bad_samples = bad_samples
        self._names, self._image_ids = list(losses[0]), image_ids
        self._gathered, self._norm, self._own = HostCopy(gathered), HostCopy(norm), HostCopy(_stacked(losses))

    def read(self, *, is_scaled: bool) -> StepResult:
        """Wait for the result; every rank must call this.

        Args:
            is_scaled: whether fp16's gradient scaler is on. It raises its scale until a gradient is not finite, which
                is no problem.
        """
        reports = []
        for row in self._gathered.read():  # [ranks, losses + numbers]
            values: dict[str, Any] = dict(zip([*self._names, *NUMBERS], row, strict=True))
            values |= {name: int(values[name]) for name in (*COUNTS, "signal", "replaced")}
            reports.append(StepReport({name: values.pop(name) for name in self._names}, **values))
        norm: Any = self._norm.read()
        problem = self._nonfinite_losses(reports)
        if not problem and not math.isfinite(norm) and not is_scaled:
            problem = f"the gradient is {norm}, though every loss is finite"
        return StepResult(reports, norm, problem, self._replaced(reports))

    def _replaced(self, reports: Sequence[StepReport]) -> list[BadSample]:
        """Return the samples that the loaders of all ranks replaced."""
        if not any(report.replaced for report in reports):
            return []
        from accelerate.utils import gather_object

        return list(gather_object(list(self._bad_samples)))

    def _nonfinite_losses(self, reports: Sequence[StepReport]) -> str:
        """Return which losses are not finite, on which ranks and samples; empty if all are finite."""
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
            for image_ids, losses in zip(self._image_ids, self._own.read(), strict=True)
            if not all(map(math.isfinite, losses))
            for image_id in image_ids
        ]
        gathered = gather_object([own])
        where = ", ".join(f"{name} is {value} on rank {rank}" for rank, name, value in bad)
        samples = ", ".join(image_id for rank in sorted({rank for rank, _, _ in bad}) for image_id in gathered[rank])
        return f"{where} (samples {samples})"


def exchange(
    accelerator: Accelerator, losses: Sequence[Losses], loaded: LoaderStatistics, signal: int, replaced: int = 0
) -> Tensor:
    """Share what this rank reports, in one collective operation that the host does not wait for.

    Args:
        losses: of each batch of this rank.
        loaded: what this rank's loader did for these batches.
        signal: number of the signal that this rank received; 0 for none.
        replaced: number of damaged samples that its loader replaced.

    Returns:
        float32 [ranks, losses + NUMBERS], the same on every rank.
    """
    import numpy as np
    import torch

    from trainer.step.host_copy import to_device

    numbers = {
        "data_wait_s": loaded.waited_s,
        "read_mb": loaded.nbytes / 1e6,
        **{name: getattr(loaded, name) for name in COUNTS},
        "memory_mb": peak_memory_mb(accelerator.device),
        "signal": signal,
        "replaced": replaced,
    }
    own = to_device(np.array([numbers[name] for name in NUMBERS], np.float32), accelerator.device)
    gathered: Tensor = accelerator.gather(torch.cat((_stacked(losses).mean(0), own))[None])
    return gathered


def _stacked(losses: Sequence[Losses]) -> Tensor:
    """Return the losses of each batch, float32 [batches, losses]."""
    import torch

    return torch.stack([torch.stack([loss.float() for loss in each.values()]) for each in losses])


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


def weighted_sum(losses: Mapping[str, Any], weights: LossConfig, step: int) -> Any:
    """Return the sum of the losses of the `step`-th step, from 1 on, each times its weight: tensors or numbers."""
    warmed = step / max(weights.affinity_warmup, 1)
    warm = {"loss_mask_affinity": min(1.0, warmed), "loss_mask_teacher": min(1.0, max(0.0, warmed - 1))}
    return sum(
        warm.get(name, 1.0) * getattr(weights, name.removeprefix("loss_")) * loss for name, loss in losses.items()
    )
