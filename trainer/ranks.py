"""What the ranks of a run do together: joining, agreeing, sharing. Every rank must call each of these."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shards.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from shards.storage import Location
    from trainer.checkpoint import State

log = logging.getLogger("trainer.ranks")


class TrainingError(UserError):
    """Training cannot go on."""


def start_accelerator() -> Accelerator:
    """Join the ranks that the launcher started.

    Raises:
        UserError: the launcher started several processes and accelerate would let each train alone.
    """
    import torch
    from accelerate import Accelerator

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU, accelerate takes the processes of a launcher for lone ones unless it is told to use the CPU.
    device = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    accelerator = Accelerator(cpu=launched > 1 and not device)
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


def from_main(value: Any) -> Any:
    """The main rank's value, on every rank."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def newest_checkpoint(run: Location, accelerator: Accelerator) -> State | None:
    """The run's newest intact checkpoint; the main rank chooses, so that all ranks take the same.

    Raises:
        CheckpointError, StorageError: as `checkpoint.load_newest`.
    """
    from trainer.checkpoint import load, load_newest

    newest = load_newest(run) if accelerator.is_main_process else None
    folder = from_main(newest[0] if newest else None)
    if newest is not None:
        return newest[1]
    return load(folder) if folder is not None else None


def share_buffers(network: nn.Module) -> None:
    """Give every rank the main rank's buffers, in place.

    DDP does so before a forward pass; after it, each rank's batch norm has counted a batch of its own.
    """
    from accelerate.utils import broadcast

    for buffer in network.buffers():
        broadcast(buffer)


def mean_losses(
    step: int, names: Sequence[str], table: Sequence[Sequence[float]], image_ids: Sequence[str]
) -> dict[str, float]:
    """Each loss, averaged over the ranks.

    Args:
        step, names: the step and its losses, to be named.
        table: a row a rank, the same on every rank: its losses, and whatever follows them.
        image_ids: of this rank's batch.

    Raises:
        TrainingError: a loss of any rank is not finite; on every rank alike.
    """
    bad = [(rank, name, v) for rank, row in enumerate(table) for name, v in zip(names, row) if not math.isfinite(v)]
    if bad:
        from accelerate.utils import gather_object

        keys = gather_object([list(image_ids)])
        where = ", ".join(f"{name} is {value} on rank {rank}" for rank, name, value in bad)
        samples = ", ".join(key for rank in sorted({rank for rank, _, _ in bad}) for key in keys[rank])
        raise TrainingError(f"step {step}: {where} (samples {samples}): lower optim.lr, or look at these samples")
    return {name: sum(row[i] for row in table) / len(table) for i, name in enumerate(names)}
