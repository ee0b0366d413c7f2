"""What each augmentation costs, and how well boxes follow objects that are turned.

    python benchmarks/augmentation.py
    python benchmarks/augmentation.py --shards PATH      # and boxes, compared with the masks of a dataset

- Cost: processor time of `TrainCollate` with an option of `data` minus that without, on one thread. Images are 1024 x
  768 with 5 or 20 masks, scaled to 1024 pixels. For comparison, torchvision's transform of the decoded image, with
  full-size masks, where it has one.
- Boxes: the mean IoU of two rules for an object without a mask, with the box of its turned mask: the box around the
  turned ellipse inside its box, and that around its turned corners.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.building import machine
from benchmarks.training_sides import CLASSES, draw, full_size
from shards.format import rle
from shards.format.dataset import open_dataset
from shards.format.sample import Sample
from shards.stream.loader import loader
from shards.stream.streams import EvalStream
from trainer.config.settings import DataConfig
from trainer.data.affine import box_around
from trainer.data.collate import TrainCollate, decode_image

OBJECTS = (5, 20)
BATCH = 8
PLAIN = DataConfig(batch_size=BATCH, min_size=768, max_size=1024, flip=0)
BILINEAR = v2.InterpolationMode.BILINEAR
OPTIONS: dict[str, tuple[dict[str, Any], Callable[[Any], Any] | None]] = {
    "flip": ({"flip": 1}, v2.RandomHorizontalFlip(1)),
    "rotate, shear, translate": (
        {"rotate": 10, "shear": 5, "translate": 0.1},
        v2.RandomAffine(10, (0.1, 0.1), None, 5, interpolation=BILINEAR),
    ),
    "iou_crop": ({"iou_crop": 1}, v2.RandomIoUCrop()),
    "photometric": ({"photometric": 0.5}, v2.RandomPhotometricDistort()),
    "mosaic": ({"mosaic": 1}, None),
    "copy_paste": ({"copy_paste": 1}, None),
}


def main() -> int:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="repetitions; the medians count [7]")
    parser.add_argument("--shards", help="dataset whose masks boxes are compared with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; ms per image on one thread, medians of {options.rounds} rounds\n")
    heads = [f"{count} objects | torchvision" for count in OBJECTS]
    print(f"| | {' | '.join(heads)} |\n| --- |{' ---: |' * 2 * len(OBJECTS)}")
    columns = [costs(count, options.rounds) for count in OBJECTS]
    for name in columns[0]:
        print(f"| {name} | {' | '.join(shown(value) for column in columns for value in column[name])} |")
    if options.shards:
        print("\n| degrees | masks | ellipse | corners |\n| ---: | ---: | ---: | ---: |")
        masks = [mask for sample in samples_of(options.shards) for mask in masks_of(sample)]
        for degrees in (5, 10, 20, 45):
            print(f"| {degrees} | {len(masks)} | {' | '.join(f'{mean:.2f}' for mean in agreement(masks, degrees))} |")
    return 0


def costs(objects: int, rounds: int) -> dict[str, tuple[float, float | None]]:
    """Return milliseconds per image without options, and what each adds, with what torchvision's transform takes."""
    samples = [draw(objects, number) for number in range(BATCH)]
    inputs = [stock_input(sample) for sample in samples]
    calls: dict[str, Callable[[int], Any]] = {"": partial(TrainCollate(PLAIN, 0, CLASSES), samples)}
    for name, (changes, transform) in OPTIONS.items():
        calls[name] = partial(TrainCollate(replace(PLAIN, **changes), 0, CLASSES), samples)
        if transform:
            calls[f"{name} by torchvision"] = partial(apply, transform, inputs)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for epoch in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call(epoch)
            times[name].append((time.process_time() - start) * 1000 / BATCH)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    plain = medians.pop("")
    added = {name: (medians[name] - plain, medians.get(f"{name} by torchvision")) for name in OPTIONS}
    return {"decoding, scaling and masks": (plain, None), **{f"+ {name}": pair for name, pair in added.items()}}


def apply(transform: Callable[[Any], Any], inputs: list[Any], epoch: int) -> None:
    """Apply a transform of torchvision to each input."""
    for one in inputs:
        transform(one)


def stock_input(sample: Sample) -> tuple[Any, dict[str, Any]]:
    """Return the input of torchvision's transforms."""
    boxes = torch.tensor([i.bbox for i in sample.instances])
    boxes[:, 2:] += boxes[:, :2]
    return tv_tensors.Image(decode_image(sample.image)), {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(sample.height, sample.width)),  # type: ignore[call-overload]
        "labels": torch.tensor([i.category_id for i in sample.instances]),
        "masks": tv_tensors.Mask(full_size(sample)),
    }


def samples_of(root: str) -> Iterator[Sample]:
    """Yield the samples of all splits of a dataset."""
    dataset = open_dataset(root)
    for split in dataset.splits:
        for batch in loader(EvalStream(dataset, split, batch_size=8), workers=0):
            yield from batch


def masks_of(sample: Sample) -> Iterator[np.ndarray]:
    """Yield the pixels, int [K, 2] x and y, of each mask of an object."""
    for instance in sample.instances:
        if instance.segmentation is not None and not instance.is_group_of:
            pixels = np.argwhere(rle.decode(instance.segmentation))[:, ::-1]
            if len(pixels):
                yield pixels


def agreement(masks: list[np.ndarray], degrees: float) -> tuple[float, float]:
    """Return the mean IoU of the boxes of the ellipse and of the corners with those of the masks, turned both ways."""
    found: list[tuple[float, float]] = []
    for pixels in masks:
        box = torch.tensor([[*pixels.min(0), *(pixels.max(0) + 1)]], dtype=torch.float32)
        corners = np.concatenate([pixels + offset for offset in ((0, 0), (0, 1), (1, 0), (1, 1))])
        for angle in (math.radians(degrees), -math.radians(degrees)):
            turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
            moved = corners @ turn[:2, :2].T
            truth = torch.tensor([[*moved.min(0), *moved.max(0)]], dtype=torch.float32)
            rules: list[Tensor] = [box_around(box, turn, ellipse=ellipse) for ellipse in (True, False)]
            ellipse, outer = (box_iou(rule, truth).item() for rule in rules)
            found.append((ellipse, outer))
    first, second = np.mean(found, axis=0).tolist()
    return first, second


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
