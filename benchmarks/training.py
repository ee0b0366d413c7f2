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
import io
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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.building import machine
from benchmarks.requirements import fail
from shards.format import rle
from shards.format.sample import Instance, Sample
from trainer.config.settings import DataConfig, LossConfig, ModelConfig
from trainer.data import augment
from trainer.data.collate import TrainCollate, decode_image
from trainer.data.instances import Batch, read_instances
from trainer.model.build import build_model
from trainer.model.losses import Trainable, mask_loss, targets_of
from trainer.model.roi_align import pool

OBJECTS = (5, 20, 50)
WIDTH, HEIGHT = 1024, 768
CLASSES = 5  # with the background
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


def draw(objects: int, number: int) -> Sample:
    """Draw a smooth picture with ellipses that are 24 to 300 pixels wide and high."""
    rng = np.random.default_rng([objects, number])
    small = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    ys, xs = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    instances = []
    for _ in range(objects):
        h, w = np.exp(rng.uniform(np.log(24), np.log(300), 2))
        y, x = rng.uniform(h / 2, HEIGHT - h / 2), rng.uniform(w / 2, WIDTH - w / 2)
        mask = rle.encode(((((ys - y) / h * 2) ** 2 + ((xs - x) / w * 2) ** 2) <= 1).astype(np.uint8))
        instances.append(Instance(int(rng.integers(1, CLASSES)), rle.bounds(mask), mask))
    return Sample(f"{objects}-{number}", file.getvalue(), WIDTH, HEIGHT, tuple(instances))


def settings(options: argparse.Namespace, flip: float = 0.5) -> DataConfig:
    """Return the data settings of both sides."""
    return DataConfig(
        resize="shortest", min_size=options.max_size * 3 // 4, max_size=options.max_size, flip=flip, max_instances=0
    )


def network_of(options: argparse.Namespace) -> MaskRCNN:
    """Build the network, with the same random weights in every process."""
    torch.manual_seed(0)
    model = ModelConfig(backbone=options.backbone, weights="none")
    return build_model(model, settings(options), CLASSES).train().to(options.device)


def stock_load(samples: Sequence[Sample], flip: float) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Make the input of torchvision's model as its reference scripts do (references/detection, presets with hflip)."""
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    images, targets = [], []
    for sample in samples:
        boxes = np.array([i.bbox for i in sample.instances], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        image, target = transform(
            tv_tensors.Image(decode_image(sample.image)),
            {
                "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(sample.height, sample.width)),
                "labels": torch.tensor([i.category_id for i in sample.instances]),
                "masks": tv_tensors.Mask(full_size(sample)),
            },
        )
        images.append(image)
        targets.append(target)
    return images, targets


def full_size(sample: Sample) -> np.ndarray:
    """Decode the masks of a sample with pycocotools: uint8 [M, H, W]."""
    return np.stack([rle.decode(i.segmentation) for i in sample.instances if i.segmentation is not None])


def stock_resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks as torchvision's GeneralizedRCNNTransform: uint8 [M, h, w]."""
    return F.interpolate(masks[:, None].float(), size=size)[:, 0].byte()


def stock_losses(network: MaskRCNN, loaded: Any, device: str) -> dict[str, Tensor]:
    """Compute torchvision's losses of what `stock_load` returned."""
    images, targets = loaded
    moved = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]
    losses: dict[str, Tensor] = network([image.to(device, non_blocking=True) for image in images], moved)
    return losses


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
            return TrainCollate(settings(self.options, flip), 0)(some, 0)
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
            target = {"masks": instances.bitmaps, "frames": instances.frames, "labels": labels}
            value = mask_loss(logits, [rois], [matched], [target])
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
    sizes = [(height, width)] * options.batch
    call = pool if side == "maskstream" else type(pooler).__call__
    forward, backward, now = [], [], CLOCKS[options.clock]
    for _ in range(5):
        start = now()
        pooled = call(pooler, features, boxes, sizes)
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

    Pixels, boxes, weights and sampled RoIs are the same. torchvision gets full-size masks, resized as it resizes them.
    """
    samples = [draw(objects, number) for number in range(options.batch)]
    network = network_of(options)
    batch: Batch = TrainCollate(settings(options, flip=0), 0)(samples, 0).to(options.device)
    stock = copy.deepcopy(network)
    stock.transform._skip_resize = True
    images, targets = [], []
    for sample, target, image, (height, width) in zip(
        samples, targets_of(batch, LossConfig()), batch.images, batch.sizes.tolist(), strict=True
    ):
        images.append(image[:, :height, :width].float() / 255)
        masks = stock_resize(torch.from_numpy(full_size(sample)), (height, width)).to(options.device)
        targets.append({"boxes": target["boxes"], "labels": target["labels"], "masks": masks})
    torch.manual_seed(7)
    found = Trainable(network)(batch)
    torch.manual_seed(7)
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
