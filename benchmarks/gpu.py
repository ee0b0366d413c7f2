"""Compare training and evaluation on a GPU with torchvision's own step: same images, network, weights and run.

    python benchmarks/gpu.py                 # about 6 minutes on one GPU
    python benchmarks/gpu.py --quick         # seconds on a CPU, to see that it works: a tiny network
    python benchmarks/gpu.py --json gpu.json

Needs torch, torchvision, numpy, pycocotools and pyarrow. torchvision's side is that of its reference scripts: its
transforms, its model in training mode, autocast, channels-last. Both sides get decoded batches in page-locked memory,
and the time of a step includes their copies to the GPU. Images are drawn at 1333 x 800 pixels, so that neither side
interpolates, and padded to 1344 x 800. Both sides run under bfloat16 autocast, with fused or foreach optimizers.

Prints Markdown: images per second, peak memory, how much of the time the GPU computes, and how often the host waits for
it; then the step by part, evaluation, and the largest batch that fits. What --minutes leaves no time for is printed as
"not run".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import training_sides as sides
from benchmarks.building import machine
from shards.format import rle
from trainer.config.settings import DataConfig, ModelConfig
from trainer.data.collate import EvalBatch, TrainCollate, decode_image
from trainer.model.backbones import cache_frozen_norms
from trainer.model.build import build_model
from trainer.model.inference import detect_batches
from trainer.step.trainable import Trainable

CARDS = (16, 24, 80)  # GB of memory
BATCHES = 2  # different ones per cell
MODES = ("no", "default", "reduce-overhead")  # of train.compile
PARTS = {
    "torchvision": {
        "resize and normalise": "transform",
        "backbone": "backbone",
        "RPN head": "rpn.head",
        "proposals and NMS": "rpn.filter_proposals",
        "matching of anchors": "rpn.assign_targets_to_anchors",
        "RPN losses": "rpn.compute_loss",
        "matching and choice of RoIs": "roi_heads.select_training_samples",
        "RoIAlign, boxes": "roi_heads.box_roi_pool",
        "box head": "roi_heads.box_head",
        "RoIAlign, masks": "roi_heads.mask_roi_pool",
        "mask head": "roi_heads.mask_head",
    },
    "maskstream": {
        "backbone and RPN head": "backbone_stage",
        "proposals, NMS, matching, RPN losses": "proposal_stage",
        "box branch": "box_branch",
        "mask branch": "mask_branch",
    },
}


@dataclass(frozen=True)
class Cell:
    """One setting of the comparison."""

    side: str
    backbone: str
    images: int
    objects: int
    compiled: str = "no"


@dataclass
class Result:
    """What was measured of a cell; memory in bytes, None where there is no GPU or no time."""

    images_per_s: float
    peak: int | None = None
    busy: float | None = None  # share of the time in which a kernel runs
    waits: int | None = None  # of the host, per step
    parts: dict[str, float] = field(default_factory=dict)  # ms per step


class Run:
    """The networks, data and device of all cells."""

    def __init__(self, *, quick: bool) -> None:
        self.cuda = torch.cuda.is_available() and not quick
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.width, self.height = (128, 96) if quick else (1333, 800)
        self.warm_up, self.steps = (1, 1) if quick else (4, 12)
        narrow = {"fpn_channels": 16, "box_head_features": 16, "mask_head_channels": [16], "detections_per_image": 8}
        self.sizes: dict[str, Any] = {"rois_per_image": 32, **narrow} if quick else {}
        self.data = DataConfig(resize="shortest", min_size=self.height, max_size=self.width, flip=0.5, max_instances=0)

    def autocast(self) -> torch.autocast:
        """Return the mixed precision of both sides."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def network(self, backbone: str) -> MaskRCNN:
        """Build a network with the same random weights for each side."""
        torch.manual_seed(0)
        model = ModelConfig(backbone=backbone, weights="none", **self.sizes)  # type: ignore[arg-type]
        network = build_model(model, self.data, sides.CLASSES)
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def pinned(self, tensor: Tensor) -> Tensor:
        """Return a tensor in page-locked memory where there is a GPU."""
        return tensor.pin_memory() if self.cuda else tensor

    def step_of(self, cell: Cell) -> tuple[Any, Callable[[int], None]]:
        """Return what a cell trains, and a function that does the step of a number."""
        samples = [
            [sides.draw(cell.objects, BATCHES * i + n, self.width, self.height) for i in range(cell.images)]
            for n in range(BATCHES)
        ]
        network = self.network(cell.backbone).train()
        losses: Callable[[int], dict[str, Tensor]]
        model: Any = network
        if cell.side == "maskstream":
            model = step = Trainable(network).to(self.device)
            cache_frozen_norms(network, torch.float32)
            if cell.compiled != "no":
                step.compile_parts(mode=cell.compiled)
            collate = TrainCollate(self.data, 0, sides.CLASSES)
            batches = [collate(own, 0) for own in samples]
            if self.cuda:
                batches = [batch.pin_memory() for batch in batches]

            def losses(number: int) -> dict[str, Tensor]:
                found: dict[str, Tensor] = step(batches[number % BATCHES].to(self.device))
                return found
        else:
            loaded = [sides.stock_load(own, 0.5) for own in samples]
            loaded = [
                ([*map(self.pinned, images)], [{k: self.pinned(v) for k, v in target.items()} for target in targets])
                for images, targets in loaded
            ]

            def losses(number: int) -> dict[str, Tensor]:
                return sides.stock_losses(network, loaded[number % BATCHES], str(self.device))

        kind = {"fused": True} if cell.side == "maskstream" else {"foreach": True}
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, **kind)

        def step_number(number: int) -> None:
            torch.manual_seed(number)
            with self.autocast():
                found = losses(number)
            torch.stack(list(found.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return model, step_number

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, cell: Cell, *, parts: bool = False) -> Result:
        """Measure one cell."""
        model, step = self.step_of(cell)
        for number in range(self.warm_up):
            step(number)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.synchronize()
        began = time.perf_counter()
        for number in range(self.steps):
            step(number)
        self.synchronize()
        result = Result(cell.images * self.steps / (time.perf_counter() - began))
        if self.cuda:
            result.peak = torch.cuda.max_memory_allocated()
            result.busy = self.busy_share(step)
            result.waits = count_waits(step)
        if parts:
            result.parts = self.time_parts(cell.side, model, step)
        return result

    def busy_share(self, step: Callable[[int], None]) -> float:
        """Return the share of the time of three steps in which a kernel runs."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            began = time.perf_counter()
            for number in range(3):
                step(number)
            self.synchronize()
            seconds = time.perf_counter() - began
        kernels = sorted(
            (e.time_range.start, e.time_range.end)
            for e in profile.events()
            if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)
        )
        busy = until = 0.0
        for start, end in kernels:  # in microseconds, and several may run at a time
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
        return busy / 1e6 / seconds

    def time_parts(self, side: str, model: Any, step: Callable[[int], None]) -> dict[str, float]:
        """Return the median milliseconds of each part of the forward pass, and of the rest of the step."""
        times: dict[str, list[float]] = {name: [] for name in (*PARTS[side], "the rest, with the backward pass")}
        for number in range(1 if self.width < 1000 else 6):
            began, spent = time.perf_counter(), dict.fromkeys(times, 0.0)
            with contextlib.ExitStack() as stack:
                for name, path in PARTS[side].items():
                    stack.enter_context(self.timed(model, path, spent, name))
                step(number)
                self.synchronize()
            whole = time.perf_counter() - began
            spent["the rest, with the backward pass"] = whole - sum(spent.values())
            for name, seconds in spent.items():
                times[name].append(1000 * seconds)
        return {name: statistics.median(values) for name, values in times.items()}

    @contextlib.contextmanager
    def timed(self, model: Any, path: str, spent: dict[str, float], name: str) -> Iterator[None]:
        """Add the time of each call of an attribute of the model, waiting for the GPU before and after it."""
        *owners, last = path.split(".")
        owner = model
        for one in owners:
            owner = getattr(owner, one)
        module = getattr(owner, last)
        target, attribute = (module, "forward") if isinstance(module, torch.nn.Module) else (owner, last)
        call = getattr(target, attribute)

        def timed_call(*arguments: Any, **options: Any) -> Any:
            self.synchronize()
            began = time.perf_counter()
            result = call(*arguments, **options)
            self.synchronize()
            spent[name] += time.perf_counter() - began
            return result

        setattr(target, attribute, timed_call)
        try:
            yield
        finally:
            setattr(target, attribute, call)

    def evaluate(self, side: str, backbone: str, images: int) -> float:
        """Return the images per second of inference, with masks as RLE on the host; 100 detections per image."""
        network = self.network(backbone).eval()
        network.roi_heads.score_thresh = 0.0
        decoded = [
            self.pinned(decode_image(sides.draw(20, n, self.width, self.height).image).contiguous())
            for n in range(images)
        ]
        batches = [EvalBatch(decoded, [])] * (5 if self.cuda else 1)

        def run(some: list[EvalBatch]) -> None:
            with self.autocast():
                if side == "maskstream":
                    deque(detect_batches(network, some, self.device), maxlen=0)
                else:
                    for batch in some:
                        stock_detect(network, batch.images, self.device)

        run(batches[:1])
        self.synchronize()
        began = time.perf_counter()
        run(batches)
        return images * len(batches) / (time.perf_counter() - began)


@torch.no_grad()
def stock_detect(network: MaskRCNN, images: Sequence[Tensor], device: torch.device) -> None:
    """Evaluate as torchvision's reference scripts do: the model's own output, thresholded and encoded on the host."""
    for output in network([image.to(device).float() / 255 for image in images]):
        for mask in (output["masks"] > 0.5).cpu().numpy():
            rle.encode(mask[0].astype("uint8"))


def count_waits(step: Callable[[int], None]) -> int:
    """Return how often the host waits for the GPU in a step, as torch reports it.

    torch does not report the wait for an event, of which this package's step has one.
    """
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def cells(*, quick: bool) -> list[Cell]:
    """Return the settings, the most important ones first."""
    if quick:
        return [Cell(side, "resnet18", 2, 3) for side in PARTS]
    grid = [(b, n, o) for b in ("resnet50", "resnet101") for n in (8, 2, 16) for o in (20, 5)]
    plain = [Cell(side, *one) for one in grid for side in PARTS]
    compiled = [Cell("maskstream", *grid[0], mode) for mode in MODES[1:]]
    return plain[:4] + compiled[:1] + plain[4:8] + compiled[1:] + plain[8:]


def largest_batch(small: Result, large: Result, images: tuple[int, int], gigabytes: int) -> int:
    """Return the largest batch whose memory, by the line through two measured ones, fits nine tenths of a card."""
    assert small.peak is not None
    assert large.peak is not None
    slope = (large.peak - small.peak) / (images[1] - images[0])
    return max(0, int(images[0] + (0.9e9 * gigabytes - small.peak) / slope))


def print_steps(found: dict[Cell, Result], wanted: Sequence[Cell]) -> None:
    """Print the table of steps; factors compare with torchvision in the same setting."""
    print("| backbone | images | objects | | images/s | | peak, GB | GPU busy | waits |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for cell in sorted(
        wanted, key=lambda c: (c.backbone != "resnet50", c.backbone, c.images, c.objects, c.side != "torchvision")
    ):
        result = found.get(cell)
        name = cell.side + ("" if cell.compiled == "no" else f", compiled: {cell.compiled}")
        start = f"| {cell.backbone} | {cell.images} | {cell.objects} | {name} |"
        if result is None:
            print(f"{start} not run | | | | |")
            continue
        stock = found.get(Cell("torchvision", cell.backbone, cell.images, cell.objects))
        factor = "" if stock is None or stock is result else f"{result.images_per_s / stock.images_per_s:.2f} x"
        peak = "-" if result.peak is None else f"{result.peak / 1e9:.2f}"
        busy = "-" if result.busy is None else f"{100 * result.busy:.0f} %"
        waits = "-" if result.waits is None else str(result.waits)
        print(f"{start} {result.images_per_s:.1f} | {factor} | {peak} | {busy} | {waits} |")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny images on the CPU")
    parser.add_argument("--minutes", type=float, default=6.0, help="time after which no measurement starts [6]")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    if not options.quick and not torch.cuda.is_available():
        sys.exit("benchmark: torch finds no GPU: use --quick to see that it works")
    run, end = Run(quick=options.quick), time.monotonic() + 60 * options.minutes
    where = torch.cuda.get_device_name() if run.cuda else machine()
    print(f"{where}; torch {torch.__version__}; images of {run.width} x {run.height}, bfloat16 autocast\n")
    found: dict[Cell, Result] = {}
    wanted = cells(quick=options.quick)
    for number, cell in enumerate(wanted):
        if time.monotonic() > end - 30 * run.cuda:  # half a minute is for evaluation
            break
        try:
            found[cell] = run.measure(cell, parts=number < 2)
        except torch.cuda.OutOfMemoryError:
            print(f"{cell}: out of memory", file=sys.stderr)
        if cell.compiled != "no":
            torch._dynamo.reset()  # a CUDA graph keeps its memory, which the next cell's peak would contain
        if run.cuda:
            torch.cuda.empty_cache()
    print_steps(found, wanted)
    for cell in (cell for cell in wanted[:2] if cell in found):
        print(f"\n{cell.side}, {cell.backbone}, {cell.images} images of {cell.objects} objects, ms per step:\n")
        print("| part | ms |\n| --- | ---: |")
        for name, ms in found[cell].parts.items():
            print(f"| {name} | {ms:.1f} |")
    backbone, images = ("resnet18", 2) if options.quick else ("resnet50", 8)
    print("\n| evaluation | images/s |\n| --- | ---: |")
    evaluated = {side: run.evaluate(side, backbone, images) for side in PARTS}
    for side, speed in evaluated.items():
        print(f"| {side} | {speed:.1f} |")
    fits: dict[str, dict[int, int]] = {}
    for side in PARTS if run.cuda else ():
        small, large = (found.get(Cell(side, "resnet50", n, 20)) for n in (2, 8))
        if small and large:
            fits[side] = {card: largest_batch(small, large, (2, 8), card) for card in CARDS}
            print(
                f"\n{side}: largest batch, by the slope of the memory: "
                + ", ".join(f"{n} in {c} GB" for c, n in fits[side].items())
            )
    if options.json:
        steps = [asdict(cell) | asdict(result) for cell, result in found.items()]
        value = {"device": where, "torch": torch.__version__, "steps": steps, "evaluation": evaluated, "largest": fits}
        Path(options.json).write_text(json.dumps(value, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
