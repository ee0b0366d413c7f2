"""Measure each treatment of incomplete annotations: the same scenes, seeds and steps, with and without it.

    python benchmarks/gaps.py --parallel 2 --folder gaps-out    # an hour on two cores; the same command resumes

Fully annotated synthetic street scenes lose annotations in three ways that occur in Open Images. The trainer learns
from each with the treatment on and off, and is evaluated on held-out scenes that are fully annotated. Each run starts
from a network trained on other scenes (those of the next seed, fully annotated), as one starts from COCO weights: with
random weights and so few steps, the seeds differ more than the treatments. Prints a Markdown table.

- masks: objects keep their boxes and lose their masks, with probability 1/2 each.
- crowds: objects of a class that are close together become one group-of box.
- unverified: a class that is present in an image loses its objects and its verification there, with probability 1/2.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.building import machine
from demo.scenes import SceneConfig, SceneObject, image_id, scene_of
from shards.format import rle
from shards.format.dataset import Category, Shard
from shards.format.dataset_writer import finish_dataset
from shards.format.index_schema import IndexRow
from shards.format.sample import Instance, Sample
from shards.format.shard_tar import pack_shard, shard_path
from shards.storage.location import Location

ROOT = Path(__file__).parents[1]
CLASSES = (
    Category(1, "Person", "/m/01g317"),
    Category(2, "Car", "/m/0k4j"),
    Category(3, "Traffic light", "/m/015qff"),
    Category(4, "Traffic sign", "/m/01mqdt"),
)
CLASS_IDS = {"Man": 1, "Woman": 1, "Boy": 1, "Girl": 1, "Van": 2, "Limousine": 2, "Stop sign": 4}
CLASS_IDS |= {category.name: category.id for category in CLASSES}
ALL_IDS = tuple(category.id for category in CLASSES)
LONG_SIDE = 128  # pixels, of the scenes and of the network's input
MIN_FILLED = 0.5  # of a crowd's box by the boxes of its members


@dataclass(frozen=True)
class Arm:
    """One way to train: which annotations are missing, and the options of the trainer."""

    gap: str
    name: str
    options: tuple[str, ...] = ()


BASE = Arm("base", "random weights, fully annotated")
ARMS = (
    Arm("none", "fully annotated"),
    Arm("masks", "on: train class and box only"),
    Arm("masks", "off: objects without a mask are background", ("--loss.unmasked", "background")),
    Arm("crowds", "on: a group-of box is ignored"),
    Arm("crowds", "off: a group-of box is background", ("--loss.group_of", "background")),
    Arm("crowds", "off: a group-of box is an object", ("--loss.group_of", "object")),
    Arm("unverified", "on: background, or an unverified class"),
    Arm("unverified", "off: unverified is absent", ("--loss.unverified", "absent")),
)


def main() -> int:
    """Train every arm with every seed, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm, at least 2 [3]")
    parser.add_argument("--train", type=int, default=400, help="training scenes [400]")
    parser.add_argument("--val", type=int, default=160, help="held-out scenes [160]")
    parser.add_argument("--steps", type=int, default=160, help="training steps of eight images [160]")
    parser.add_argument("--parallel", type=int, default=1, help="simultaneous runs, of one thread each [1]")
    parser.add_argument("--folder", type=Path, help="where to keep the runs; finished ones are not repeated")
    parser.add_argument("--only", nargs="*", default=[arm.gap for arm in ARMS], help="gaps to measure [all]")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: each seed starts from the network of another: give at least 2")
    with tempfile.TemporaryDirectory() as temporary:
        # Runs of other sizes have their own folder.
        sizes = f"{options.train}-{options.val}-{options.steps}-{options.seeds}"
        folder = (options.folder or Path(temporary)) / sizes
        arms = [arm for arm in ARMS if arm.gap in options.only]
        jobs = [(arm, seed) for seed in range(options.seeds) for arm in arms]
        jobs = [(BASE, seed) for seed in range(options.seeds)] + jobs
        counts = {
            (gap, seed): write_dataset(folder / f"{gap}-{seed}", gap, seed, options.train, options.val)
            for gap in dict.fromkeys(arm.gap for arm, _ in jobs)
            for seed in range(options.seeds)
        }
        with ThreadPoolExecutor(options.parallel) as pool:
            work = partial(train, folder, options)
            bases, others = jobs[: options.seeds], jobs[options.seeds :]
            results = dict(zip(jobs, [*pool.map(work, bases), *pool.map(work, others)]))
    print_table(arms, results, counts, options)
    return 0


def sample_of(config: SceneConfig, split: str, index: int) -> Sample:
    """Draw a scene with every object's mask and every class verified."""
    scene = scene_of(config, split, index)
    file = io.BytesIO()
    Image.fromarray(scene.image).save(file, "JPEG", quality=92)
    height, width = scene.image.shape[:2]
    instances = tuple(_instance(thing, number) for number, thing in enumerate(scene.objects))
    absent = tuple(c for c in ALL_IDS if c not in {instance.category_id for instance in instances})
    present = tuple(c for c in ALL_IDS if c not in absent)
    return Sample(image_id(config, split, index), file.getvalue(), width, height, instances, present, absent)


def _instance(thing: SceneObject, number: int) -> Instance:
    left, top, right, bottom = thing.box
    box = (float(left), float(top), float(right - left), float(bottom - top))
    return Instance(CLASS_IDS[thing.name], box, rle.encode(thing.mask.astype(np.uint8)), box_id=str(number))


def without_masks(sample: Sample, rng: np.random.Generator) -> Sample:
    """Remove the masks of objects with probability 1/2 each."""
    removed = rng.random(len(sample.instances)) < 0.5
    kept = tuple(replace(i, segmentation=None) if gone else i for i, gone in zip(sample.instances, removed))
    return replace(sample, instances=kept)


def with_crowds(sample: Sample, rng: np.random.Generator) -> Sample:
    """Replace the largest set of objects of each class that fills its common box by one group-of box."""
    instances = list(sample.instances)
    for category in ALL_IDS:
        own = [i for i in instances if i.category_id == category]
        sets = [c for size in range(len(own), 1, -1) for c in combinations(own, size) if _filled(c) >= MIN_FILLED]
        if sets:
            x0, y0, x1, y1 = _hull(sets[0])
            instances = [i for i in instances if i not in sets[0]]
            instances.append(Instance(category, (x0, y0, x1 - x0, y1 - y0), None, is_group_of=True))
    return replace(sample, instances=tuple(instances))


def _hull(some: Sequence[Instance]) -> tuple[float, float, float, float]:
    left, top = min(i.bbox[0] for i in some), min(i.bbox[1] for i in some)
    return left, top, max(i.bbox[0] + i.bbox[2] for i in some), max(i.bbox[1] + i.bbox[3] for i in some)


def _filled(some: Sequence[Instance]) -> float:
    x0, y0, x1, y1 = _hull(some)
    return sum(i.bbox[2] * i.bbox[3] for i in some) / ((x1 - x0) * (y1 - y0))


def with_unverified(sample: Sample, rng: np.random.Generator) -> Sample:
    """Remove the objects and the verification of present classes with probability 1/2 each."""
    gone = {category for category in sample.verified_present if rng.random() < 0.5}
    return replace(
        sample,
        instances=tuple(i for i in sample.instances if i.category_id not in gone),
        verified_present=tuple(c for c in sample.verified_present if c not in gone),
    )


GAPS: dict[str, Callable[[Sample, np.random.Generator], Sample]] = {
    "base": lambda sample, rng: sample,
    "none": lambda sample, rng: sample,
    "masks": without_masks,
    "crowds": with_crowds,
    "unverified": with_unverified,
}


def write_dataset(root: Path, gap: str, seed: int, train: int, val: int) -> tuple[int, int]:
    """Write a shard dataset with gaps in its training scenes; return how many objects changed, and of how many."""
    config = SceneConfig(train=train, validation=val, seed=seed, long_side=LONG_SIDE, group_fraction=0)
    whole = [sample_of(config, "train", index) for index in range(train)]
    rng = np.random.default_rng(seed)
    changed = [GAPS[gap](sample, rng) for sample in whole]
    rows: list[IndexRow] = []
    shards: list[Shard] = []
    location = Location(str(root))
    held_out = [sample_of(config, "validation", index) for index in range(val)]
    for split, samples in (("train", changed), ("val", held_out)):
        packed = pack_shard(samples, split=split, path=shard_path(split, 0))
        (location / packed.shard.path).write(packed.data)
        shards.append(packed.shard)
        rows.extend(packed.rows)
    finish_dataset(location, rows, shards, CLASSES)
    untouched = sum(instance in sample.instances for sample, of in zip(changed, whole) for instance in of.instances)
    total = sum(len(sample.instances) for sample in whole)
    return total - untouched, total


class Scores(NamedTuple):
    """The scores of a network on the held-out scenes, each 0 to 1.

    Attributes:
        box: AP of boxes at IoU 0.5.
        mask: AP of masks at IoU 0.5.
        recall: of detections with a score of at least 0.5.
        precision: of these detections.
    """

    box: float
    mask: float
    recall: float
    precision: float


def train(folder: Path, options: argparse.Namespace, job: tuple[Arm, int]) -> Scores:
    """Train and evaluate an arm, unless its scores are there already."""
    arm, seed = job
    run = run_of(folder, arm, seed)
    evaluation = run / "scores" / "evaluation.json"
    if not evaluation.exists():
        run_trainer(folder, run, arm, seed, options)  # resumes, if it was interrupted
        places = ["--data.shards", folder / f"{arm.gap}-{seed}", "--data.split", "val", "--out", evaluation.parent]
        run_script("evaluate.py", "--checkpoint", run, *places, "--score", 0.5, "--pictures", 0)
    result = json.loads(evaluation.read_text())
    table = np.array(result["confusion"]["counts"])
    correct = table.trace()
    recall, precision = float(correct / table[:-1].sum()), float(correct / max(table[:, :-1].sum(), 1))
    scores = Scores(result["bbox"]["ap50"], result["segm"]["ap50"], recall, precision)
    print(f"{arm.gap}, {arm.name}, seed {seed}: {scores}", file=sys.stderr, flush=True)
    return scores


def run_of(folder: Path, arm: Arm, seed: int) -> Path:
    """Return the run folder of an arm."""
    return folder / f"run-{(BASE, *ARMS).index(arm)}-{arm.gap}-{seed}"


def run_trainer(folder: Path, run: Path, arm: Arm, seed: int, options: argparse.Namespace) -> None:
    """Run trainer/train.py with the settings of an arm."""
    steps = options.steps
    settings = {
        "config": ROOT / "configs/demo.yaml",
        "data.shards": folder / f"{arm.gap}-{seed}",
        "data.batch_size": 8,
        "data.workers": 0,
        "data.min_size": LONG_SIDE * 3 // 4,
        "data.max_size": LONG_SIDE,
        "model.anchor_sizes": [12, 24, 48, 72, 96],
        "optim.milestones": [round(0.75 * steps), round(0.92 * steps)],
        "train.epochs": 1,
        "train.steps_per_epoch": steps,
        "train.checkpoint_steps": steps,
        "train.eval_epochs": 1,
        "train.seed": seed,
        "run.dir": run,
        "model.weights": "none" if arm is BASE else run_of(folder, BASE, (seed + 1) % options.seeds),
    }
    run_script("train.py", *(word for name, value in settings.items() for word in (f"--{name}", value)), *arm.options)


def run_script(name: str, *words: object) -> None:
    """Run a script of trainer/ in a process of its own, with one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "trainer" / name), *map(str, words)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"benchmark: {name} {' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")


def print_table(
    arms: Sequence[Arm],
    results: dict[tuple[Arm, int], Scores],
    counts: dict[tuple[str, int], tuple[int, int]],
    options: argparse.Namespace,
) -> None:
    """Print the Markdown table of the docs: means over the seeds, and the treatment's gain in mask AP.

    Runs with and without a treatment see the same scenes in the same order, so the gain is the mean of the differences
    of each seed, with its standard error.
    """
    print(
        f"{options.train} training and {options.val} held-out scenes of {LONG_SIDE} pixels, {options.steps} steps of 8 "
        f"images, {options.seeds} seeds; {machine()}\n"
    )
    print("| missing annotations | treatment | box AP50 | mask AP50 | gain of the treatment | recall | precision |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    of_arm = {arm: np.array([results[arm, seed] for seed in range(options.seeds)]) for arm in arms}
    for arm in arms:
        touched = [counts[arm.gap, seed] for seed in range(options.seeds)]
        share = sum(t for t, _ in touched) / sum(n for _, n in touched)
        treated = next(one for one in arms if one.gap == arm.gap)
        box, mask, recall, precision = of_arm[arm].mean(axis=0)
        gain = "" if arm is treated else shown((of_arm[treated] - of_arm[arm])[:, 1])
        cells = f"{box:.3f} | {mask:.3f} | {gain} | {recall:.2f} | {precision:.2f}"
        print(f"| {arm.gap}: {share:.0%} of the objects | {arm.name} | {cells} |")


def shown(gains: NDArray[np.float64]) -> str:
    """Format the mean and standard error of the gains of all seeds, [S]."""
    error = f" ± {gains.std(ddof=1) / math.sqrt(len(gains)):.3f}" if len(gains) > 1 else ""
    return f"{gains.mean():+.3f}{error}"


if __name__ == "__main__":
    sys.exit(main())
