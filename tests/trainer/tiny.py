"""A dataset of drawn shapes, a network small enough for two CPU cores, and trainings in separate processes."""

import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from shards.storage.location import Location
from tests import support
from tests.support import REPOSITORY
from trainer.commands import train
from trainer.model.build import build_model, num_classes
from trainer.model.checkpoint import State, save
from trainer.step.trainable import Trainable

CATEGORIES = (Category(1, "Square", "/m/sq"), Category(2, "Disc", "/m/di"))
COLOURS = {1: (220, 50, 40), 2: (40, 80, 220)}

# A run of seconds.
SECTIONS = """
data: {batch_size: 2, workers: 0, lanes: 2, min_size: 64, max_size: 64}
model: {backbone: mobilenet_v2, norm: batch, weights: none, fpn_channels: 16, box_head_features: 32,
        mask_head_channels: [16], anchor_sizes: [8, 16, 32, 48, 64], rpn_pre_nms: [100, 100], rpn_post_nms: [50, 30],
        rois_per_image: 16, detections_per_image: 20}
optim: {lr: 0.005, warmup_steps: 3}
train: {epochs: 1, steps_per_epoch: 6, checkpoint_steps: 3, layers: all}
run: {log_steps: 2, pictures: 0, trackers: []}
"""
SETTINGS = {
    f"{section}.{name}": value for section, values in yaml.safe_load(SECTIONS).items() for name, value in values.items()
}

# Two stages of three steps, for `arguments`.
STAGES: dict[str, Any] = {
    "train__stages": "[{layers: heads, epochs: 1}, {layers: all, epochs: 1, lr: 0.1}]",
    "train__steps_per_epoch": 3,
}
SHORT_STAGES = STAGES | {"train__steps_per_epoch": 2, "optim__base_batch": 4, "data__val_split": ""}


def draw_sample(number: int) -> Sample:
    """One to three shapes on noise; every fifth image has a box without a mask, every seventh a group-of region."""
    rng = np.random.default_rng(number)
    width, height = (72, 60) if number % 2 else (60, 72)
    image = Image.fromarray(rng.integers(90, 160, (height, width, 3), dtype=np.uint8))
    instances = []
    for i in range(int(rng.integers(1, 4))):
        category, side = int(rng.integers(1, 3)), int(rng.integers(14, 30))
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        mask = Image.new("L", (width, height))
        for canvas, fill in ((ImageDraw.Draw(image), COLOURS[category]), (ImageDraw.Draw(mask), 255)):
            shape = canvas.rectangle if category == 1 else canvas.ellipse
            shape((x, y, x + side - 1, y + side - 1), fill=fill)
        encoded = None if i == 0 and number % 5 == 0 else rle.encode(np.asarray(mask))
        instances.append(Instance(category, (float(x), float(y), float(side), float(side)), encoded, box_id=str(i)))
    if number % 7 == 0:
        instances.append(Instance(2, (0.0, 0.0, 20.0, 10.0), None, box_id="group", is_group_of=True))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return Sample(f"img{number:04d}", buffer.getvalue(), width, height, tuple(instances), verified_present=(1, 2))


def write_dataset(root: Path, *, samples: int = 24, val: int = 5) -> Path:
    """A finished dataset under `root`."""
    splits = {"train": range(samples), "val": range(1000, 1000 + val)}
    drawn = {split: [draw_sample(number) for number in numbers] for split, numbers in splits.items()}
    support.write_dataset(root, drawn, per_shard=12, categories=CATEGORIES)
    return root


def arguments(dataset: Path | str, run: Path, **changes: Any) -> list[str]:
    """Arguments of train.py; a change is named with two underscores for the dot: `train__epochs=2`."""
    settings = {**SETTINGS, "data.shards": dataset, "run.dir": run}
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def predict_options(checkpoint: Path, dataset: Path) -> list[str]:
    """Arguments of predict.py for the 24 images of the training split, in 6 parts of 4."""
    command = ["--checkpoint", str(checkpoint), "--data.shards", str(dataset), "--data.split", "train", "--submission"]
    return [*command, "--score", "0.1", "--data.workers", "0", "--batch-size", "2", "--part-images", "3"]


def fill_options(checkpoint: Path, dataset: Path | str, out: Path | str, *words: object) -> list[str]:
    """Arguments of fill.py."""
    options = ["--checkpoint", checkpoint, "--data.shards", dataset, "--out", out, "--data.workers", 0, *words]
    return list(map(str, options))


def digests(root: Path) -> dict[str, str]:
    """Return the sha256 of every file under a folder."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_checkpoint(run: Path, dataset: Path, *, masks: bool = False, **changes: Any) -> Path:
    """A run folder with one checkpoint, of the untrained network of `SETTINGS`; with `masks`, it predicts some."""
    config = train.parse(arguments(dataset, run, **changes))
    torch.manual_seed(0)
    network = build_model(config.model, config.data, num_classes(CATEGORIES))
    if masks:
        torch.nn.init.normal_(network.roi_heads.mask_predictor.mask_fcn_logits.weight, std=20)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    state = State(1, 1, {}, CATEGORIES, config, network.state_dict(), optimizer.state_dict())
    save(Location(str(run)), state, keep=1)
    return run


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Call `action` before this step of the next training."""
    train_step = train.train_step

    def stepping(t: Any, *rest: Any) -> Any:
        if t.step + 1 == step:
            monkeypatch.setattr(train, "train_step", train_step)
            action()
        return train_step(t, *rest)

    monkeypatch.setattr(train, "train_step", stepping)


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def spoil_losses(monkeypatch: pytest.MonkeyPatch, *passes: int) -> list[tuple[str, ...]]:
    """Make the mask loss of these forward passes NaN; returns a list to which each pass adds its image ids."""
    forward, image_ids = Trainable.forward, []

    def failing(self: Trainable, batch: Any, **options: Any) -> Any:
        image_ids.append(batch.image_ids)
        losses = forward(self, batch, **options)
        return losses | ({"loss_mask": losses["loss_mask"] * torch.nan} if len(image_ids) in passes else {})

    monkeypatch.setattr(Trainable, "forward", failing)
    return image_ids


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a child process: this checkout's packages, one thread, no GPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "CUDA_"))}
    return {
        **kept,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        **more,
    }


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_options(ranks: int) -> list[str]:
    """Return the arguments of `accelerate launch` for a number of CPU processes."""
    several = ["--multi_gpu", "--main_process_port", str(free_port())] if ranks > 1 else []
    common = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return ["--num_processes", str(ranks), *common, *several]


def start(script: Path | str, options: list[str], *, ranks: int = 1, group: int | None = None) -> subprocess.Popen[str]:
    """Start a script under `accelerate launch` with that many CPU processes; a single one without a launcher.

    With group 0 it leads a new process group, as a command in a terminal does.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "accelerate.commands.launch", *launch_options(ranks)]
    return subprocess.Popen(
        [*command, str(script), *options],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=group,
    )


def run(script: Path | str, options: list[str], *, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a script as `start` does, and wait until no process has its output open any more."""
    process = start(script, options, ranks=ranks)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
