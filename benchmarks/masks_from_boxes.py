"""Measure masks from boxes: mask AP of classes and objects whose masks were removed, with each treatment.

    python benchmarks/masks_from_boxes.py --parallel 2 --folder few-out    # the same command resumes

The scenes are those of `gaps.py`, all masks drawn. Two ways to lose masks: A removes all masks of two of the four
classes, B removes 90 % of all masks at random; every box stays. Held-out scenes keep their masks. Each run starts from
random weights. Prints a Markdown table of mask AP (IoU 0.5 to 0.95: at 0.5, a filled box passes for a mask), with two
trivial masks of the first way's detections, the box and its ellipse, as lines. The last two columns are of the
classes without masks in A and of all in B: the share of the upper line's AP, and of the gap between the first way and
the upper line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.building import machine
from benchmarks.gaps import CLASSES, LONG_SIDE, ROOT, run_script, sample_of
from demo.scenes import SceneConfig
from shards.format import rle
from shards.format.dataset import open_dataset
from shards.format.dataset_writer import DatasetWriter
from shards.format.sample import Sample
from shards.stream.loader import loader
from shards.stream.streams import EvalStream
from trainer.data.collate import EvalCollate
from trainer.metrics.coco import CocoMetric
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.build import num_classes, rebuild
from trainer.model.checkpoint import open_checkpoint
from trainer.model.inference import detect

REMOVED = {"A": "all masks of Car and Traffic sign", "B": "90 % of all masks, at random"}
UNMASKED = (2, 4)  # category ids of Car and Traffic sign
KEPT = 0.1  # share of the masks that stay in B

AGNOSTIC = ("--model.mask_head", "agnostic")
TRUE_BOXES = ("--model.mask_rois", "gt")
DEEP = ("--model.mask_head_channels", "[64, 64, 64, 64]")
BOXES = ("--loss.unmasked", "masks")
NO_TEACHER = ("--loss.mask_teacher", "0")
NO_COLOURS = ("--loss.mask_affinity", "0")
NO_SIDES = ("--loss.mask_box", "0")


@dataclass(frozen=True)
class Way:
    """A way to train: the options of the trainer, and the way whose run fills the dataset first."""

    name: str
    options: tuple[str, ...] = ()
    filled_by: Way | None = None


DEFAULT = Way("a mask per class, no masks from boxes")
BEST = Way("agnostic, boxes, teacher", (*AGNOSTIC, *BOXES))
WAYS = (
    DEFAULT,
    Way("agnostic", AGNOSTIC),
    Way("agnostic, true boxes", (*AGNOSTIC, *TRUE_BOXES)),
    Way("agnostic, true boxes, deep head", (*AGNOSTIC, *TRUE_BOXES, *DEEP)),
    Way("a mask per class, boxes", (*BOXES, *NO_TEACHER)),
    Way("agnostic, sides of the box", (*AGNOSTIC, *BOXES, *NO_COLOURS, *NO_TEACHER)),
    Way("agnostic, colours", (*AGNOSTIC, *BOXES, *NO_SIDES, *NO_TEACHER)),
    Way("agnostic, boxes", (*AGNOSTIC, *BOXES, *NO_TEACHER)),
    BEST,
    Way("filled once, agnostic", AGNOSTIC, filled_by=BEST),
    Way(f"filled once, {BEST.name}", BEST.options, filled_by=BEST),
)
TRIVIAL = ("box", "ellipse")


@dataclass(frozen=True)
class Job:
    """A run: from which training scenes masks were removed (none, A, B), how it trains, and its seed."""

    removed: str
    way: Way
    seed: int

    def folder(self, root: Path) -> Path:
        """Return its run folder."""
        return root / f"run-{self.removed}-{self.way.name.replace(', ', '-').replace(' ', '_')}-{self.seed}"


def main() -> int:
    """Train every way with every seed, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way, at least 2 [3]")
    parser.add_argument("--train", type=int, default=500, help="training scenes [500]")
    parser.add_argument("--val", type=int, default=160, help="held-out scenes [160]")
    parser.add_argument("--steps", type=int, default=320, help="training steps of eight images [320]")
    parser.add_argument("--parallel", type=int, default=1, help="simultaneous runs, of one thread each [1]")
    parser.add_argument("--folder", type=Path, help="where to keep the runs; finished ones are not repeated")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: a standard error needs at least 2")
    seeds = range(options.seeds)
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.folder or Path(temporary)) / f"{options.train}-{options.val}-{options.steps}"
        for removed in ("none", *REMOVED):
            for seed in seeds:
                write_dataset(root / f"{removed}-{seed}", removed, seed, options.train, options.val)
        jobs = [Job("none", DEFAULT, seed) for seed in seeds]
        jobs += [Job(removed, way, seed) for way in WAYS for removed in REMOVED for seed in seeds]
        first = [job for job in jobs if job.way.filled_by is None]
        with ThreadPoolExecutor(options.parallel) as pool:
            for part in (first, [job for job in jobs if job not in first]):
                list(pool.map(partial(train, root, options.steps), part))
        print_table(root, options)
    return 0


def write_dataset(root: Path, removed: str, seed: int, train: int, val: int) -> None:
    """Write a dataset whose training scenes lack masks, unless it is there already."""
    if (root / "dataset.json").exists():
        return
    config = SceneConfig(train=train, validation=val, seed=seed, long_side=LONG_SIDE, group_fraction=0)
    rng = np.random.default_rng(seed)
    changed = [without_masks(sample_of(config, "train", index), removed, rng) for index in range(train)]
    held_out = [sample_of(config, "validation", index) for index in range(val)]
    with DatasetWriter(root, CLASSES) as writer:
        for split, samples in (("train", changed), ("val", held_out)):
            for sample in samples:
                writer.add(sample, split)


def without_masks(sample: Sample, removed: str, rng: np.random.Generator) -> Sample:
    """Return the sample without some of its masks."""
    kept = {
        "none": [True] * len(sample.instances),
        "A": [instance.category_id not in UNMASKED for instance in sample.instances],
        "B": list(rng.random(len(sample.instances)) < KEPT),
    }[removed]
    instances = [i if stays else replace(i, segmentation=None) for i, stays in zip(sample.instances, kept)]
    return replace(sample, instances=tuple(instances))


def train(root: Path, steps: int, job: Job) -> None:
    """Train and evaluate a job, unless its scores are there already."""
    run, data = job.folder(root), root / f"{job.removed}-{job.seed}"
    evaluation = run / "scores" / "evaluation.json"
    if evaluation.exists():
        return
    shards = data
    if job.way.filled_by is not None:
        shards = root / f"filled-{job.removed}-{job.seed}"
        teacher = Job(job.removed, job.way.filled_by, job.seed).folder(root)
        run_script("fill.py", "--checkpoint", teacher, "--data.shards", data, "--out", shards, "--data.workers", 0)
    settings = {
        "config": ROOT / "configs/demo.yaml",
        "data.shards": shards,
        "data.batch_size": 8,
        "data.workers": 0,
        "data.min_size": LONG_SIDE * 3 // 4,
        "data.max_size": LONG_SIDE,
        "data.val_split": "",
        "model.anchor_sizes": [12, 24, 48, 72, 96],
        "optim.milestones": [round(0.75 * steps), round(0.92 * steps)],
        "train.epochs": 1,
        "train.steps_per_epoch": steps,
        "train.checkpoint_steps": steps,
        "train.ema": 0.999,
        "train.seed": job.seed,
        "run.dir": run,
    }
    words = (word for name, value in settings.items() for word in (f"--{name}", value))
    run_script("train.py", *words, *job.way.options)  # resumes, if it was interrupted
    places = ["--data.shards", data, "--data.split", "val", "--out", evaluation.parent]
    run_script("evaluate.py", "--checkpoint", run, *places, "--pictures", 0)
    print(f"{job.folder(root).name}: {aps_of(run).round(3).tolist()}", file=sys.stderr, flush=True)


def aps_of(run: Path) -> NDArray[np.float64]:
    """Return a run's mask AP on the held-out scenes, of each class."""
    result = json.loads((run / "scores" / "evaluation.json").read_text())
    return np.array([of["ap"] for of in result["segm"]["classes"]])


def trivial_aps(run: Path, shards: Path, shape: str) -> NDArray[np.float64]:
    """Return the mask AP of each class of a run's detections, with the box or its ellipse in place of their masks."""
    dataset, network = open_dataset(shards), rebuild(open_checkpoint(str(run))).eval()
    metric = CocoMetric(dataset.categories)
    collate = EvalCollate(num_classes(dataset.categories))
    for batch in loader(EvalStream(dataset, "val", batch_size=8, collate=collate), workers=0):
        for sample, found in zip(batch.samples, detect(network, batch.images, "cpu"), strict=True):
            masks = tuple(trivial_mask(box, shape, sample.height, sample.width) for box in found.boxes.tolist())
            metric.process([EvaluatedImage(sample, replace(found, masks=masks))])
    result = metric.evaluate()
    assert result is not None
    return np.array([of.ap for of in result.segm.classes])


def trivial_mask(box: Sequence[float], shape: str, height: int, width: int) -> rle.Rle:
    """Return a box x0, y0, x1, y1, or the ellipse in it, as a mask."""
    left, top, right, bottom = box
    rows, columns = np.mgrid[:height, :width] + 0.5
    x = (2 * columns - left - right) / max(right - left, 1e-6)
    y = (2 * rows - top - bottom) / max(bottom - top, 1e-6)
    inside = np.maximum(abs(x), abs(y)) if shape == "box" else np.hypot(x, y)
    return rle.encode((inside <= 1).astype(np.uint8))


def print_table(root: Path, options: argparse.Namespace) -> None:
    """Print the Markdown table of the docs: means over the seeds with their standard errors."""
    seeds = range(options.seeds)
    print(
        f"{options.train} training and {options.val} held-out scenes of {LONG_SIDE} pixels, {options.steps} steps of 8 "
        f"images, {options.seeds} seeds; {machine()}"
    )
    print("; ".join(f"{removed}: {what}" for removed, what in REMOVED.items()), end="\n\n")
    print("| masks removed | way | Car, Traffic sign | Person, Traffic light | all | of the upper line | of the gap |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    upper = np.array([groups(aps_of(Job("none", DEFAULT, seed).folder(root))) for seed in seeds])
    print(f"| none (upper line) | {DEFAULT.name} | {cells(upper)} | | |")
    for removed in REMOVED:
        lines = {
            f"{shape} of the detection": [
                trivial_aps(Job(removed, DEFAULT, seed).folder(root), root / f"{removed}-{seed}", shape)
                for seed in seeds
            ]
            for shape in TRIVIAL
        }
        lines |= {way.name: [aps_of(Job(removed, way, seed).folder(root)) for seed in seeds] for way in WAYS}
        column = 0 if removed == "A" else 2
        low, high = np.mean([groups(aps)[column] for aps in lines[DEFAULT.name]]), upper[:, column].mean()
        for name, of_seeds in lines.items():
            found = np.array([groups(aps) for aps in of_seeds])
            mean = found[:, column].mean()
            shares = f"{mean / high:.0%} | {(mean - low) / (high - low):.0%}"
            print(f"| {removed} | {name} | {cells(found)} | {shares} |")


def groups(aps: NDArray[np.float64]) -> list[float]:
    """Return the mean AP of the classes without masks in A, of the others, and of all."""
    unmasked = np.isin([category.id for category in CLASSES], UNMASKED)
    return [float(aps[unmasked].mean()), float(aps[~unmasked].mean()), float(aps.mean())]


def cells(values: NDArray[np.float64]) -> str:
    """Format the means and standard errors over the seeds of values, [S, N], as N cells."""
    errors = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    return " | ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in zip(values.mean(axis=0), errors))


if __name__ == "__main__":
    sys.exit(main())
