"""The run's folder, and the line of progress.

    <run>/config.yaml         the resolved settings: --config of the same run
          environment.json    versions, machine, ranks
          metrics.jsonl       one row a step
          evaluations.jsonl   one row an evaluation
          checkpoints/        see `checkpoint.py`

On a local disk a row is in its file when its step is over. An object store cannot append: there the files are written
whole at every checkpoint and evaluation, so after a crash they end where the run will continue. Either way a run that
continues drops the rows beyond its checkpoint, so that every step has one row.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from datetime import timedelta
from importlib import metadata
from typing import IO, TYPE_CHECKING, Any

from shards.storage import Location
from trainer.config import Config, save_config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from shards.loader import LoaderStatistics

log = logging.getLogger("trainer")

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "fsspec", "s3fs", "numpy", "pycocotools", "safetensors")


class Rows:
    """A file of JSON lines, each with a "step".

    Args:
        location: the file.
        step: rows beyond this step are dropped; so is a last line that a crash cut off.
    """

    def __init__(self, location: Location, step: int) -> None:
        self.location = location
        text = location.read().decode("utf-8") if location.exists() else ""
        self.rows = [row for row in map(_parsed, text.splitlines()) if row is not None and row["step"] <= step]
        self._file: IO[bytes] | None = None
        self.location.write(self._whole())
        if location.is_local:
            self._file = open(location.path, "ab")  # noqa: SIM115 - open as long as the run

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; on a local disk it is flushed at once."""
        self.rows.append(dict(row))
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()

    def flush(self) -> None:
        """On an object store, write the whole file."""
        if self._file is None:
            self.location.write(self._whole())

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        if self._file is not None:
            self._file.close()

    def _whole(self) -> bytes:
        return b"".join(map(_line, self.rows))


class RunLog:
    """What the main rank writes into the run's folder.

    Args:
        run: the folder.
        config: the resolved settings.
        environment: see `environment`.
        step: the step that the run continues from; 0 for a new run.

    Raises:
        StorageError: the folder cannot be written.
    """

    def __init__(self, run: Location, config: Config, environment: Mapping[str, Any], step: int) -> None:
        save_config(config, run / "config.yaml")
        (run / "environment.json").write(json.dumps(environment, indent=1).encode("utf-8"))
        self.steps = Rows(run / "metrics.jsonl", step)
        self.evaluations = Rows(run / "evaluations.jsonl", step)

    def flush(self) -> None:
        """Make sure that what was logged so far is stored."""
        self.steps.flush()
        self.evaluations.flush()

    def close(self) -> None:
        """Store everything."""
        self.steps.close()
        self.evaluations.close()


def reading(done: LoaderStatistics) -> dict[str, Any]:
    """What the loader of the main rank did for a step, for the step's row of metrics.jsonl."""
    return {
        "read_mb": done.nbytes / 1e6,
        "requests": done.requests,
        "retries": done.retries,
        "samples": done.samples,
        "cache_hits": done.cache_hits,
    }


class Progress:
    """A line every `every` steps, with means since the line before."""

    def __init__(self, every: int, total: int) -> None:
        self.every, self.total = every, total
        self._rows: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a step's row of metrics.jsonl, and log a line when it is time."""
        self._rows.append(row)
        if row["step"] % self.every and row["step"] != self.total:
            return
        seconds = sum(row["seconds"] for row in self._rows)
        losses = {name: sum(r["losses"][name] for r in self._rows) / len(self._rows) for name in row["losses"]}
        left = timedelta(seconds=round((self.total - row["step"]) * seconds / len(self._rows)))
        log.info(
            "step %d/%d  loss %.4f (%s)  lr %.2e  %.1f images/s  data wait %.0f %% (%s)  left %s",
            row["step"],
            self.total,
            sum(losses.values()),
            "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items()),
            row["lr"],
            sum(row["images"] for row in self._rows) / seconds,
            100 * sum(row["data_wait"] * row["seconds"] for row in self._rows) / seconds,
            self._read(seconds),
            left,
        )
        self._rows.clear()

    def _read(self, seconds: float) -> str:
        """What the main rank's loader did since the line before; what did not happen is left out."""
        total = {name: sum(row[name] for row in self._rows) for name in ("read_mb", "retries", "samples", "cache_hits")}
        told = [f"{total['read_mb'] / seconds:.1f} MB/s"]
        if total["retries"]:
            told.append(f"{total['retries']} retries")
        if total["cache_hits"]:
            told.append(f"{100 * total['cache_hits'] / total['samples']:.0f} % from the cache")
        return ", ".join(told)


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What the run ran on: versions, machine, ranks."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "world_size": accelerator.num_processes,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "command": sys.argv,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor()


def _parsed(line: str) -> dict[str, Any] | None:
    """A row; None for a line that a crash cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":"), allow_nan=False).encode("utf-8") + b"\n"
