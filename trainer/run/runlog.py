"""The run's folder and the progress log.

    <run>/README.md           model card, see `report/model_card.py`
          config.yaml         the resolved settings: --config of the same run
          environment.json    versions, machine, ranks
          metrics.jsonl       one row per step; metrics.csv is the same as a table
          evaluations.jsonl   one row per evaluation
          curves.png          losses, AP, images/s, wait for data, learning rate
          batches.jpg         the first training batches: see `report/batch_pictures.py`
          pictures/           see `report/pictures.py`
          tensorboard/        files of accelerate's trackers; `run.trackers` chooses them
          wandb.txt           the id with which a run of Weights & Biases resumes; see `run/trackers.py`
          checkpoints/, best/ see `model/checkpoint.py`

The table and the curves are written again at the end of every epoch.

On a local disk a row is in its file as soon as its step is done. An object store cannot append: there the files are
written whole at every checkpoint and evaluation (the trackers' files from a temporary folder), so that after a crash
they end at the checkpoint. In both cases a resumed run drops the rows beyond its checkpoint: every step has one row.
"""

import csv
import io
import json
import logging
import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from shards.common.redact import redact, redact_values
from shards.common.text import counted, duration
from shards.storage.location import Location
from shards.stream.replacements import BadSample
from trainer.config.settings import Config
from trainer.run.best import best_evaluation, since_best
from trainer.run.distributed import TRACKER_FOLDER, tracker_folder
from trainer.run.plots import draw_curves
from trainer.run.trackers import log_pictures, start_trackers

log = logging.getLogger("trainer")

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "fsspec", "s3fs", "numpy", "pycocotools", "safetensors")


class RowFile:
    """JSON lines with a "step" each; rows beyond the given step, and a line that a crash truncated, are dropped."""

    def __init__(self, location: Location, step: int) -> None:
        self.location = location
        text = location.read().decode("utf-8", "replace") if location.exists() else ""
        self.rows = [row for row in map(_parsed, text.splitlines()) if row is not None and row["step"] <= step]
        self._write()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; on a local disk it is in the file immediately."""
        self.rows.append(dict(row))
        if self.location.is_local:
            with open(self.location.path, "ab") as file:
                file.write(_line(row))

    def flush(self) -> None:
        """Write the whole file to an object store; a local file is already complete."""
        if not self.location.is_local:
            self._write()

    def _write(self) -> None:
        self.location.write(b"".join(map(_line, self.rows)))


class RunLog:
    """Everything that the main rank logs: to the run's folder, to the terminal and to the accelerator's trackers.

    `step` is the one to resume from, 0 for a new run; `total` is the number of steps of the whole run.
    """

    def __init__(self, run: Location, config: Config, accelerator: Accelerator, step: int, total: int) -> None:
        self.run, self.accelerator = run, accelerator
        public = redact_values(config.to_dict())  # files of a run are often shared
        (run / "config.yaml").write(yaml.safe_dump(public, sort_keys=False).encode("utf-8"))
        (run / "environment.json").write(json.dumps(environment(accelerator), indent=1).encode("utf-8"))
        self.steps = RowFile(run / "metrics.jsonl", step)
        self.evaluations = RowFile(run / "evaluations.jsonl", step)
        self._drawn = len(self.steps.rows), len(self.evaluations.rows)
        self.progress = Progress(config.run.log_steps, total)
        self._title = redact(f"{run}, trained on {config.data.shards}")
        if step < total:
            compiled = ", which compiles it: that can take minutes" if config.train.compile != "no" else ""
            log.info("starting with step %d of %d: reading the first batch, then the step%s", step + 1, total, compiled)
        start_trackers(accelerator, run, flattened(public), config.run.trackers)

    @property
    def last_evaluation(self) -> int:
        """The step of the last evaluation, or 0."""
        return int(self.evaluations.rows[-1]["step"]) if self.evaluations.rows else 0

    @property
    def bad_samples(self) -> list[BadSample]:
        """The damaged samples that were replaced in the run."""
        return [BadSample(**bad) for row in self.steps.rows for bad in row.get("replaced", ())]

    def add_step(self, row: dict[str, Any], seconds: float) -> None:
        """Add to a step's row of metrics.jsonl its time, speed and share of waiting for data, and log it."""
        row |= {
            "seconds": seconds,
            "images_per_s": row["images"] / seconds,
            "data_wait": row["data_wait_s"] / seconds,
            "data_wait_longest": row["data_wait_longest_s"] / seconds,
        }
        row = _finite(row)
        self.steps.append(row)
        means = self.progress.add(row)
        if means is not None:
            self.accelerator.log(flattened({"train": means}), step=row["step"])

    @property
    def since_best(self) -> int:
        """The number of evaluations after the best one."""
        return since_best(self.evaluations.rows)

    def is_best(self, row: dict[str, Any]) -> bool:
        """Return whether an evaluation that is not logged yet is better than all that are."""
        return best_evaluation([*self.evaluations.rows, row]) is row

    def add_evaluation(self, row: dict[str, Any], pictures: Mapping[str, bytes] | None = None) -> None:
        """Log an evaluation, and its encoded pictures to the trackers."""
        self.evaluations.append(row)
        scores = {kind: {k: v for k, v in row[kind].items() if isinstance(v, float)} for kind in ("bbox", "segm")}
        self.accelerator.log(flattened({row["split"]: scores}), step=row["step"])
        log_pictures(self.accelerator, pictures or {}, row["step"])
        self.flush(draw=True)

    def flush(self, *, draw: bool) -> None:
        """Store everything that was logged so far; `draw` also writes metrics.csv and curves.png."""
        self.steps.flush()
        self.evaluations.flush()
        seen = len(self.steps.rows), len(self.evaluations.rows)
        # A run that starts from another run's checkpoint (--resume) may evaluate it before its own first step.
        if draw and self.steps.rows and seen != self._drawn:
            self._drawn = seen
            (self.run / "metrics.csv").write(table(self.steps.rows))
            (self.run / "curves.png").write(draw_curves(self.steps.rows, self.evaluations.rows, self._title))
        if not self.run.is_local:
            _upload(tracker_folder(self.run), self.run / TRACKER_FOLDER)

    def close(self) -> None:
        """Store everything, after accelerate has ended its trackers."""
        self.flush(draw=True)
        if not self.run.is_local:
            shutil.rmtree(tracker_folder(self.run), ignore_errors=True)


class Progress:
    """The progress log: a line for the first step and for every `every` steps, with means since the previous line."""

    def __init__(self, every: int, total: int) -> None:
        self.every, self.total, self._is_first = every, total, True
        self._rows: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Add a step's row of metrics.jsonl; if a line is due, log it and return its means."""
        self._rows.append(row)
        if row["step"] % self.every and row["step"] != self.total and not self._is_first:
            return None
        means = _means(self._rows)
        seconds_per_step = sum(row["seconds"] for row in self._rows) / len(self._rows)
        # The first step waits for the loaders and may compile: it says nothing about the others.
        left = timedelta(seconds=round((self.total - row["step"]) * seconds_per_step))
        timing = f"in {duration(seconds_per_step)}" if self._is_first else f"left {left}"
        self._is_first = False
        log.info(
            "step %d/%d  loss %.4f (%s)  lr %.2e  %.1f images/s  data wait %.0f %%%s  memory %.1f GB  %s",
            row["step"],
            self.total,
            means["loss"],
            "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in means["losses"].items()),
            means["lr"],
            means["images_per_s"],
            100 * means["data_wait"],
            _reading(means),
            means["memory_mb"] / 1000,
            timing,
        )
        self._rows.clear()
        return means


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of rows of metrics.jsonl; steps that were skipped do not count in the losses."""
    last = rows[-1]
    seconds = sum(row["seconds"] for row in rows)
    done = [row for row in rows if "skipped" not in row]
    count = max(len(done), 1)
    totals = {name: sum(row[name] for row in rows) for name in ("read_mb", "retries", "samples", "cache_hits")}
    waits = {
        name: sum(row[name] * row["seconds"] for row in rows) / seconds for name in ("data_wait", "data_wait_longest")
    }
    return {
        "loss": sum(row["loss"] for row in done) / count,
        "losses": {name: sum(row["losses"][name] for row in done) / count for name in last["losses"]},
        "lr": last["lr"],
        "images_per_s": sum(row["images"] for row in rows) / seconds,
        **waits,
        "read_mb_per_s": totals["read_mb"] / seconds,
        "retries": totals["retries"],
        "cache_share": totals["cache_hits"] / max(totals["samples"], 1),
        "memory_mb": last["memory_mb"],
    }


def _reading(means: Mapping[str, Any]) -> str:
    """Return in brackets what the loaders of all ranks did since the previous line; zeros are omitted.

    A step may read nothing and still have its data: from the cache, or from what was read ahead, which can be all of a
    small dataset.
    """
    parts = []
    if rate := means["read_mb_per_s"]:
        parts.append(f"{rate:.1f} MB/s" if rate >= 0.1 else f"{1000 * rate:.1f} kB/s")
    if means["retries"]:
        parts.append(counted(means["retries"], "retry", "retries"))
    if means["cache_share"]:
        parts.append(f"{100 * means['cache_share']:.0f} % from the cache")
    return f" ({', '.join(parts)})" if parts else ""


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to `section/key`; lists become text: trackers take only numbers, texts and booleans."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        name = f"{prefix}{key}"
        if isinstance(entry, Mapping):
            flat |= flattened(entry, f"{name}/")
        else:
            flat[name] = entry if isinstance(entry, bool | int | float | str) else str(entry)
    return flat


def table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows of metrics.jsonl as CSV, with one column per loss."""
    flat = [{**{k: v for k, v in row.items() if k != "losses"}, **row["losses"]} for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue().encode("utf-8")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return the versions, machine and ranks of a run."""
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": accelerator.num_processes,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "command": redact_values(sys.argv),
    }


def cpu_name() -> str:
    """Return the model name of the processor, or what the platform calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux, or a sandbox
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _parsed(line: str) -> dict[str, Any] | None:
    """Return a row, or None for a line that a crash truncated."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":"), allow_nan=False).encode("utf-8") + b"\n"


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON cannot represent, by None."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _upload(folder: str, to: Location) -> None:
    for path in Path(folder).rglob("*"):
        if path.is_file():
            (to / path.relative_to(folder).as_posix()).write(path.read_bytes())
