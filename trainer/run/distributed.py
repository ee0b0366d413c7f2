"""What the ranks of a run do together: joining, agreeing, sharing. Every rank must call each of these."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shards.common.errors import StorageError, UserError
from shards.storage.location import check_writable

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from shards.storage.location import Location
    from shards.stream.loader import LoaderStatistics
    from trainer.config.settings import LossConfig
    from trainer.model.checkpoint import State

log = logging.getLogger("trainer.run.distributed")

TRACKER_FOLDER = "tensorboard"
# How long a rank waits for the others before it takes them for lost; the launcher ends all of them if one dies. Who
# has done its share of a split waits for the slowest, and all wait while the main one rates it and writes.
PATIENCE = timedelta(days=30)
PATIENCE_IN_TRAINING = timedelta(hours=2)  # an evaluation is long, but ranks that hang should not hold GPUs for days


class TrainingError(UserError):
    """Training cannot go on."""


def start_accelerator(
    precision: str = "launcher",
    trackers: Sequence[str] = (),
    run: Location | None = None,
    timeout: timedelta = PATIENCE,
) -> Accelerator:
    """Join the ranks that the launcher started.

    Args:
        precision: see `train.precision`.
        trackers: see `run.trackers`.
        run: the run's folder, in which trackers that write files do so; from a temporary one where it is not local.
        timeout: how long a rank waits for the others; torch's own would be 10 minutes (NCCL) or 30 (gloo).

    Raises:
        UserError: the launcher started several processes and accelerate would let each train alone; arithmetic that
            the device does not have; a tracker that accelerate does not know or whose package is missing.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    check_trackers(trackers)

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU, accelerate takes the processes of a launcher for lone ones unless it is told to use the CPU.
    device = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    try:
        accelerator = Accelerator(
            cpu=launched > 1 and not device,
            mixed_precision={"launcher": None, "fp32": "no"}.get(precision, precision),
            log_with=list(trackers) or None,
            project_dir=None if run is None else tracker_folder(run),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
    except ValueError as error:  # such as bf16 on a GPU that has none
        raise UserError(f"accelerate cannot start: {error}") from error
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, accelerate joined {accelerator.num_processes}: "
            "set ACCELERATE_USE_CPU=true for several CPU processes"
        )
    # accelerate sets MASTER_ADDR where several processes were asked for, but starts them only with --multi_gpu.
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and accelerator.device.type == "cpu":
        log.warning(
            "accelerate launch --cpu starts one process, whatever --num_processes says; several are started by "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    return accelerator


def tracker_folder(run: Location) -> str:
    """The local folder that a run's trackers write into."""
    if run.is_local:
        return f"{run.path}/{TRACKER_FOLDER}"
    return f"{tempfile.gettempdir()}/maskstream-{hashlib.sha256(run.url.encode()).hexdigest()[:16]}"


def check_trackers(names: Sequence[str]) -> None:
    """Whether accelerate can report to each of these; by itself it leaves out in silence what it cannot.

    Raises:
        UserError: an unknown name, or a missing package.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(getattr(kind, "value", kind)) for kind in LOGGER_TYPE_TO_CLASS)
    installed = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UserError(f"run.trackers: accelerate does not know {name!r}: it knows {', '.join(known)}")
        if name not in installed:
            raise UserError(f"run.trackers: {name} is not installed: pip install {name}, or leave it out")


def from_main(value: Any) -> Any:
    """The main rank's value, on every rank."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def main_can_write(folder: Location, option: str, accelerator: Accelerator) -> None:
    """Find out whether files can be written below a folder, as `check_writable`; the main rank tries, for all.

    Raises:
        StorageError: nothing can be written there; on every rank, so that none waits for the main one.
    """
    trouble = None
    if accelerator.is_main_process:
        try:
            check_writable(folder, option)
        except StorageError as error:
            trouble = error
    trouble = from_main(trouble)
    if trouble is not None:
        raise trouble


def checkpoint_to_resume(run: Location, resume: str, accelerator: Accelerator) -> State | None:
    """Where a run goes on: its own newest intact checkpoint if it has one, else what `run.resume` names.

    The main rank chooses, so that all ranks take the same.

    Raises:
        CheckpointError, StorageError: as `checkpoint.find`.
    """
    from trainer.model.checkpoint import find, load

    found = find(run, resume) if accelerator.is_main_process else None
    folder = from_main(found[0] if found else None)
    if found is not None:
        return found[1]
    return load(folder) if folder is not None else None


def bad_losses(names: Sequence[str], table: Sequence[Sequence[float]], image_ids: Sequence[str]) -> str:
    """Which losses of a step are not finite, where, and on which samples; empty where all are.

    Args:
        names: of the losses.
        table: a row a rank, the same on every rank: its losses, and whatever follows them.
        image_ids: of this rank's batches that have a loss that is not finite.

    Returns:
        The same on every rank.
    """
    bad = [(rank, name, v) for rank, row in enumerate(table) for name, v in zip(names, row) if not math.isfinite(v)]
    if not bad:
        return ""
    from accelerate.utils import gather_object

    keys = gather_object([list(image_ids)])
    where = ", ".join(f"{name} is {value} on rank {rank}" for rank, name, value in bad)
    samples = ", ".join(key for rank in sorted({rank for rank, _, _ in bad}) for key in keys[rank])
    return f"{where} (samples {samples})"


def mean_losses(names: Sequence[str], table: Sequence[Sequence[float]]) -> dict[str, float]:
    """Each loss, averaged over the ranks; `table` as for `bad_losses`."""
    return {name: sum(row[i] for row in table) / len(table) for i, name in enumerate(names)}


def rank_report(done: LoaderStatistics, device: torch.device) -> list[float]:
    """What this rank tells the others of a step beside its losses: what its loader did for it, and its memory."""
    return [
        done.waited_s,
        done.nbytes / 1e6,
        done.requests,
        done.retries,
        done.samples,
        done.cache_hits,
        memory_mb(device),
    ]


def all_ranks(table: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A step's `rank_report` of each rank as one, for its row of metrics.jsonl: the mean wait and the longest, what was
    read by all together, and the most memory that one of them has held."""
    waited, read_mb, requests, retries, samples, cache_hits, memory = zip(*table)
    return {
        "data_wait_s": sum(waited) / len(waited),
        "data_wait_longest_s": max(waited),
        "read_mb": round(sum(read_mb), 6),
        "requests": int(sum(requests)),
        "retries": int(sum(retries)),
        "samples": int(sum(samples)),
        "cache_hits": int(sum(cache_hits)),
        "memory_mb": max(memory),
    }


def memory_mb(device: torch.device) -> float:
    """The most memory in 10^6 bytes that this rank has held so far: of its GPU, or of its process without one."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def weighted_sum(losses: Mapping[str, Any], weights: LossConfig) -> Any:
    """What is made small: the sum of the losses, as tensors or numbers, each times its weight."""
    return sum(getattr(weights, name.removeprefix("loss_")) * loss for name, loss in losses.items())
