"""Joining the ranks of a run, and decisions of the main rank that all follow. Every rank must call each function."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shards.common.errors import UserError
from shards.storage.location import check_writable

if TYPE_CHECKING:
    from accelerate import Accelerator

    from shards.storage.location import Location
    from trainer.model.checkpoint import State

log = logging.getLogger("trainer.run.distributed")

TRACKER_FOLDER = "tensorboard"
# How long a rank waits for the others. The launcher ends all of them if one dies; so this only has to be longer than
# any work of one rank: its share of a split, or the main rank's metrics and files.
TIMEOUT = timedelta(days=30)
TRAINING_TIMEOUT = timedelta(hours=2)  # longer than an evaluation; ranks that hang should not hold GPUs for days


class TrainingError(UserError):
    """Training cannot continue."""


def start_accelerator(
    precision: str = "launcher", trackers: Sequence[str] = (), run: Location | None = None, timeout: timedelta = TIMEOUT
) -> Accelerator:
    """Join the ranks that the launcher started.

    UserError if the launcher started several processes and accelerate would train each by itself, the device does not
    support the precision, or a tracker is unknown or not installed.

    Args:
        precision: see `train.precision`.
        trackers: see `run.trackers`.
        run: the run's folder, for trackers that write files; see `tracker_folder`.
        timeout: how long a rank waits for the others; torch's default is 10 minutes (NCCL) or 30 (gloo).
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    check_trackers(trackers)

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU, accelerate ignores the other processes of a launcher unless it is asked to use the CPU.
    device = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    try:
        accelerator = Accelerator(
            cpu=launched > 1 and not device,
            mixed_precision={"launcher": None, "fp32": "no"}.get(precision, precision),
            log_with=list(trackers) or None,
            project_dir=None if run is None else tracker_folder(run),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
    except ValueError as error:  # such as bf16 on a GPU without it
        raise UserError(f"accelerate cannot start: {error}") from error
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, accelerate joined {accelerator.num_processes}: "
            "set ACCELERATE_USE_CPU=true for several CPU processes"
        )
    # accelerate sets MASTER_ADDR if several processes were requested, but starts them only with --multi_gpu.
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and accelerator.device.type == "cpu":
        log.warning(
            "accelerate launch --cpu starts one process and ignores --num_processes; to start several, use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    return accelerator


def tracker_folder(run: Location) -> str:
    """Return the local folder of a run's trackers: in the run's folder, or a temporary one if the run is remote."""
    if run.is_local:
        return f"{run.path}/{TRACKER_FOLDER}"
    return f"{tempfile.gettempdir()}/maskstream-{hashlib.sha256(run.url.encode()).hexdigest()[:16]}"


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that accelerate would silently skip: an unknown one, or one without its package."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(getattr(kind, "value", kind)) for kind in LOGGER_TYPE_TO_CLASS)
    installed = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UserError(f"run.trackers: accelerate does not know {name!r}: it knows {', '.join(known)}")
        if name not in installed:
            raise UserError(f"run.trackers: {name} is not installed: pip install {name}, or leave it out")


def from_main(value: Any) -> Any:
    """Return the main rank's value on every rank."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def main_can_write(folder: Location, option: str, accelerator: Accelerator) -> None:
    """Check on the main rank that a folder is writable; errors as in `on_main`."""
    on_main(lambda: check_writable(folder, option), accelerator)


def on_main(action: Callable[[], None], accelerator: Accelerator) -> None:
    """Run an action on the main rank; its `UserError` is raised on every rank, so that none waits."""
    problem = None
    if accelerator.is_main_process:
        try:
            action()
        except UserError as error:
            problem = error
    problem = from_main(problem)
    if problem is not None:
        raise problem


def checkpoint_to_resume(run: Location, resume: str, accelerator: Accelerator) -> State | None:
    """Return on every rank what `checkpoint.find` finds on the main rank; None for a new run."""
    from trainer.model.checkpoint import find, load

    found = find(run, resume) if accelerator.is_main_process else None
    folder = from_main(found[0] if found else None)
    if found is not None:
        return found[1]
    return load(folder) if folder is not None else None
