"""Compare a training step with torchvision's: same images, network, weights and machine, in one run.

    python benchmarks/training.py                                          # CPU: ResNet-18, 512 pixels
    python benchmarks/training.py --precision float32 bfloat16             # and in mixed precision
    python benchmarks/training.py --device cuda --backbone resnet50 --max-size 1024 --batch 8 --workers 4

- maskstream: `TrainCollate` and `Trainable`, as trainer/train.py runs them.
- torchvision: its Mask R-CNN in training mode with the input of its reference scripts: full-size masks, transforms v2
  (flip), resizing inside the model.

Images are 1024 x 768 with 5, 20 or 50 objects, each with a mask. Every measurement runs in its own process, so that the
peak memory is its own. Prints Markdown: steps with loading, then masks alone (from RLE to loss) and RoIAlign alone,
then the differences between the losses.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection.roi_heads import maskrcnn_loss

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.building import machine
from benchmarks.requirements import fail
from benchmarks.training_sides import (
    CLASSES,
    HEIGHT,
    WIDTH,
    draw,
    full_size,
    network_of,
    settings,
    stock_load,
    stock_losses,
    stock_resize,
)
from shards.format.sample import Sample
from trainer.data import augment
from trainer.data.collate import TrainCollate
from trainer.data.instances import Batch, read_instances
from trainer.data.mask_bitmaps import sample_targets
from trainer.step.losses import mask_loss
from trainer.step.roi_align import Rois, pool_in_fixed_shapes, pool_on_cpu
from trainer.step.trainable import Trainable

OBJECTS = (5, 20, 50)
ROIS = 512  # per image, as in torchvision
POSITIVE_ROIS = ROIS // 4
SIDES = ("torchvision", "maskstream")
FLOAT32 = "float32"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Key = tuple[str, str, int]  # what is measured (the precision, for steps), the side, objects per image


def main() -> int:
    """Measure everything and print the tables, or run one measurement in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--backbone", default="resnet18", help="[resnet18]")
    parser.add_argument("--max-size", type=int, default=512, help="longer side of the network's input in pixels [512]")
    parser.add_argument("--batch", type=int, default=2, help="images per step [2]")
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after one for warm-up [6]")
    precisions = [FLOAT32, "bfloat16"]
    parser.add_argument(
        "--precision", nargs="+", choices=precisions, default=[FLOAT32], help="bfloat16 uses autocast [float32]"
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time of one thread, for busy machines [wall]"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0 loads between the steps [0]")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions; the best result of each counts [1]")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        fail(f"--device {options.device}: torch finds no such device")
    if options.measure:
        if options.clock == "cpu":
            torch.set_num_threads(1)
        kind, side, objects = options.measure.split(",")
        print(json.dumps(MEASURES[kind](side, int(objects), options)))
        return 0
    kinds: list[Key] = [(p, side, objects) for objects in OBJECTS for p in options.precision for side in SIDES]
    kinds += [("masks", side, objects) for objects in OBJECTS for side in SIDES]
    kinds += [("pooling", side, 0) for side in SIDES]
    kinds += [("losses", "both", objects) for objects in OBJECTS]
    found: dict[Key, dict[str, float]] = {}
    for _ in range(options.rounds):
        for key in kinds:
            again = in_own_process(key)
            found[key] = min(found.get(key, again), again, key=lambda row: row.get("seconds", 0.0))
    print_tables(found, options)
    return 0


def in_own_process(key: Key) -> dict[str, float]:
    """Run one measurement by this script in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", ",".join(map(str, key))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"benchmark: {' '.join(command)} failed with status {done.returncode}: see its message above")
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def mask_bytes(side: str, loaded: Any, options: argparse.Namespace) -> int:
    """Return the bytes of a batch's masks during a step: as loaded, and for torchvision as resized in the model too."""
    if side == "maskstream":
        return int(loaded.bitmaps.nbytes + loaded.frames.nbytes)
    height, width = augment.scaled_size(HEIGHT, WIDTH, options.max_size * 3 // 4, options.max_size)
    return sum(target["masks"].nbytes + len(target["masks"]) * height * width for target in loaded[1])


class Loads(Dataset[Any]):
    """Batches of one side by number; every second one is flipped."""

    def __init__(self, side: str, samples: Sequence[Sample], options: argparse.Namespace) -> None:
        self.side, self.samples, self.options = side, samples, options

    def __len__(self) -> int:
        return int(self.options.steps) + 1

    def __getitem__(self, number: int) -> Any:
        flip = float(number % 2)
        start = number * self.options.batch % len(self.samples)
        some = [*self.samples, *self.samples][start : start + self.options.batch]
        if self.side == "maskstream":
            return TrainCollate(settings(self.options, flip), 0, CLASSES)(some, 0)
        return stock_load(some, flip)


def measure_step(precision: str, side: str, objects: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure loading, and forward, backward and update, of a few steps; medians in seconds per image."""
    samples = [draw(objects, number) for number in range(2 * options.batch)]
    network = network_of(options)
    trainable = Trainable(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    cuda, now = options.device.startswith("cuda"), CLOCKS[options.clock]
    loads = Loads(side, samples, options)
    baseline = resident()
    waits, steps, masks = [], [], 0
    batches = iter(DataLoader(loads, batch_size=None, num_workers=options.workers, pin_memory=cuda))
    for number in range(len(loads)):
        torch.manual_seed(number)
        start = now()
        loaded = next(batches)
        waited = now()
        with torch.autocast(options.device.partition(":")[0], torch.bfloat16, enabled=precision != FLOAT32):
            if side == "maskstream":
                losses = trainable(loaded.to(options.device))
            else:
                losses = stock_losses(network, loaded, options.device)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        waits.append(waited - start)
        steps.append(now() - waited)
        masks = max(masks, mask_bytes(side, loaded, options))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline
    peak = torch.cuda.max_memory_allocated() if cuda else used
    wait, step = (statistics.median(part[1:]) / options.batch for part in (waits, steps))
    return {"seconds": wait + step, "wait": wait, "step": step, "masks": masks / options.batch, "peak": peak}


def measure_masks(side: str, objects: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure from RLE to the mask loss of one image, without image and network; medians in seconds."""
    sample = draw(objects, 0)
    size = augment.scaled_size(HEIGHT, WIDTH, options.max_size * 3 // 4, options.max_size)
    factors = torch.tensor([size[1] / WIDTH, size[0] / HEIGHT] * 2)
    generator = torch.Generator().manual_seed(objects)
    matched = torch.randint(objects, (POSITIVE_ROIS,), generator=generator)
    logits = torch.randn((POSITIVE_ROIS, CLASSES, 28, 28), generator=generator)
    boxes = read_instances(sample.instances).boxes * factors
    rois = boxes[matched] + torch.randn((POSITIVE_ROIS, 4), generator=generator)
    labels = torch.tensor([i.category_id for i in sample.instances])
    make, loss, now = [], [], CLOCKS[options.clock]
    for _ in range(12):
        start = now()
        if side == "maskstream":
            instances = read_instances(sample.instances).flip(WIDTH).scale(*factors[:2].tolist())
            made = now()
            expected = sample_targets(instances.bitmaps, instances.frames, matched, rois, logits.shape[-1])
            value = mask_loss(logits, labels[matched], expected, torch.ones(len(rois), dtype=torch.bool))
        else:
            masks = stock_resize(torch.from_numpy(full_size(sample)).flip(-1), size)
            made = now()
            value = maskrcnn_loss(logits, [rois], [masks], [labels], [matched])
        end = now()
        assert value > 0
        make.append(made - start)
        loss.append(end - made)
    made, lost = statistics.median(make[2:]), statistics.median(loss[2:])
    return {"seconds": made + lost, "make": made, "loss": lost}


def measure_pooling(side: str, objects: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure RoIAlign of a batch's boxes from the maps of the FPN; medians in seconds per image."""
    height, width = augment.scaled_size(HEIGHT, WIDTH, options.max_size * 3 // 4, options.max_size)
    generator = torch.Generator().manual_seed(0)
    pooler = network_of(options).roi_heads.box_roi_pool
    features = {
        str(level): torch.randn((options.batch, 256, height // 4 >> level, width // 4 >> level), generator=generator)
        .to(options.device)
        .requires_grad_()
        for level in range(4)
    }
    sides = torch.exp(torch.rand((options.batch, ROIS, 2), generator=generator) * 3 + 2.5)
    corners = torch.rand(sides.shape, generator=generator) * (torch.tensor([width, height]) - sides).clamp(min=0)
    boxes = [of_image.to(options.device) for of_image in torch.cat((corners, corners + sides), dim=2)]
    rois = Rois(torch.cat(boxes), torch.arange(options.batch, device=options.device).repeat_interleave(ROIS))
    pool = pool_on_cpu if options.device == "cpu" else pool_in_fixed_shapes
    stock = partial(pooler, features, boxes, [(height, width)] * options.batch)
    call = stock if side == "torchvision" else partial(pool, pooler, list(features.values()), rois)
    forward, backward, now = [], [], CLOCKS[options.clock]
    for _ in range(5):
        start = now()
        pooled = call()
        middle = now()
        pooled.backward(torch.ones_like(pooled))
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        forward.append(middle - start)
        backward.append(now() - middle)
    there, back = (statistics.median(times[1:]) / options.batch for times in (forward, backward))
    return {"seconds": there + back, "forward": there, "backward": back}


def measure_losses(side: str, objects: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the relative differences between both sides' losses of one batch.

    Pixels, boxes and weights are the same, and all anchors and RoIs train. torchvision gets full-size masks, resized as
    it resizes them.
    """
    samples = [draw(objects, number) for number in range(options.batch)]
    network = network_of(options)
    batch: Batch = TrainCollate(settings(options, flip=0), 0, CLASSES)(samples, 0).to(options.device)
    stock = copy.deepcopy(network)
    stock.transform._skip_resize = True
    images, targets = [], []
    for number, (sample, image) in enumerate(zip(samples, batch.images, strict=True)):
        height, width = batch.sizes[number].tolist()
        images.append(image[:, :height, :width].float() / 255)
        masks = stock_resize(torch.from_numpy(full_size(sample)), (height, width)).to(options.device)
        count = len(sample.instances)
        targets.append({"boxes": batch.boxes[number, :count], "labels": batch.labels[number, :count], "masks": masks})
    for one in (network, stock):  # every anchor and RoI trains: each side draws others from the same seed
        for sampler in (one.rpn.fg_bg_sampler, one.roi_heads.fg_bg_sampler):
            sampler.batch_size_per_image, sampler.positive_fraction = 10**6, 0.5
    found = Trainable(network)(batch)
    expected = stock(images, targets)
    return {name: (found[name] / expected[name] - 1).abs().item() for name in expected}


MEASURES: dict[str, Callable[[str, int, argparse.Namespace], dict[str, float]]] = {
    FLOAT32: partial(measure_step, FLOAT32),
    "bfloat16": partial(measure_step, "bfloat16"),
    "masks": measure_masks,
    "pooling": measure_pooling,
    "losses": measure_losses,
}


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def print_tables(found: dict[Key, dict[str, float]], options: argparse.Namespace) -> None:
    """Print the Markdown tables of the docs."""
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else machine()
    clock = ", processor time of one thread" if options.clock == "cpu" else ""
    print(
        f"{where}; {options.backbone}-FPN, images of {WIDTH} x {HEIGHT} resized to {options.max_size} pixels, "
        f"{options.batch} per step, {options.workers} loader processes; medians of {options.steps} steps{clock}\n"
    )
    print("| objects | | loading, ms/image | step, ms/image | images/s | | masks, MB/image | | peak, MB | |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for objects in OBJECTS:
        stock = found[options.precision[0], "torchvision", objects]
        for precision in options.precision:
            for side in SIDES:
                row = found[precision, side, objects]
                faster, less, lower = (stock[name] / row[name] for name in ("seconds", "masks", "peak"))
                print(
                    f"| {objects} | {side}, {precision} | {1000 * row['wait']:.0f} | {1000 * row['step']:.0f} "
                    f"| {1 / row['seconds']:.2f} | {faster:.2f} x | {row['masks'] / 1e6:.2f} | {less:.0f} x less "
                    f"| {row['peak'] / 1e6:.0f} | {lower:.2f} x less |"
                )
    print(f"\nMasks alone, on the CPU: one image, {POSITIVE_ROIS} positive RoIs.\n")
    print("| objects | | RLE to model input, ms | targets and loss, ms | together | |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for objects in OBJECTS:
        stock = found["masks", "torchvision", objects]
        for side in SIDES:
            row = found["masks", side, objects]
            cells = " | ".join(f"{1000 * row[name]:.1f}" for name in ("make", "loss", "seconds"))
            print(f"| {objects} | {side} | {cells} | {stock['seconds'] / row['seconds']:.1f} x |")
    print(f"\nRoIAlign of {ROIS} boxes per image, from the maps of the FPN.\n")
    print("| | forward, ms/image | backward, ms/image | together | |\n| --- | ---: | ---: | ---: | ---: |")
    for side in SIDES:
        row = found["pooling", side, 0]
        cells = " | ".join(f"{1000 * row[name]:.0f}" for name in ("forward", "backward", "seconds"))
        print(f"| {side} | {cells} | {found['pooling', SIDES[0], 0]['seconds'] / row['seconds']:.1f} x |")
    print("\nRelative differences between the losses, for the same pixels, weights and RoIs:\n")
    names = list(found["losses", "both", OBJECTS[0]])
    print(f"| objects | {' | '.join(names)} |\n| ---: |{' ---: |' * len(names)}")
    for objects in OBJECTS:
        differences = [f"{value:.2g}" for value in found["losses", "both", objects].values()]
        print(f"| {objects} | {' | '.join(differences)} |")


if __name__ == "__main__":
    sys.exit(main())
