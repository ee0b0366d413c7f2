"""Count the kernels and host-device synchronisations of a training step, without a GPU.

    python benchmarks/step_cost.py                                     # ResNet-18, 256 pixels, float32
    python benchmarks/step_cost.py --backbone resnet50 --precision bfloat16
    python benchmarks/step_cost.py --json step_cost.json

A step runs on the CPU in the form that a GPU would run, and every operation that torch dispatches is counted: as a
kernel unless it only makes a view or allocates, and as a synchronisation if it waits for the device on CUDA. The count
of kernels is of operations, of which a few start several kernels or none; it does not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision.ops.boxes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import training_sides as sides
from shards.format.sample import Sample
from trainer.config.settings import LossConfig, ModelConfig
from trainer.data.collate import TrainCollate
from trainer.model.backbones import cache_frozen_norms
from trainer.model.build import build_model
from trainer.run.optim import frozen_copy
from trainer.step.trainable import Trainable

BOXES = "maskstream, masks from boxes"  # of every second object, with a teacher
SIDES = ("torchvision", "maskstream", BOXES)
CELLS = ((2, 5), (2, 20), (8, 5), (8, 20))  # images per batch, objects per image
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = ALLOCATIONS | {"_unsafe_view", "lift_fresh", "detach", "alias", "_reshape_alias", "sym_size", "is_same_size"}
WAITS = {"nonzero", "_local_scalar_dense", "item", "is_nonzero", "equal", "masked_select", "nms", "lift_fresh"}
WAITS |= {"unique_dim", "unique_consecutive", "_unique2"}


class StepCounter(TorchDispatchMode):
    """Counts what is dispatched in its context.

    Attributes:
        kernels: by operation.
        synchronisations: by operation and the function of torchvision or this package that called it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.synchronisations: Counter[str] = Counter()
        self._last: Any = None  # the result of the last operation that waits, if it made a tensor of a Python number
        self._place = ""

    def __enter__(self) -> StepCounter:
        """Count from here on; `tolist` too, which torch does not dispatch."""
        tolist = torch.Tensor.tolist

        def counted(tensor: Tensor) -> Any:
            self.synchronisations[f"tolist in {_caller()}"] += 1
            return tolist(tensor)

        self._patch = mock.patch.object(torch.Tensor, "tolist", counted)
        self._patch.start()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        self._patch.stop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run and count one operation."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not _is_view(func):
            self.kernels[name] += 1
        if self._last is not None and any(value is self._last for value in args):
            # A Python number for the next operation, which passes it to its kernel, or is counted itself.
            self.synchronisations[self._place] -= 1
            self._last = None
        if _waits(func, args, kwargs or {}):
            self._last = result if name == "lift_fresh" else None
            self._place = f"{name} in {_caller()}"
            self.synchronisations[self._place] += 1
        return result


def _is_view(func: Any) -> bool:
    """Whether an operation starts no kernel."""
    schema = func._schema
    returns_alias = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    return (returns_alias and not writes) or func.overloadpacket.__name__ in VIEWS


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation waits on CUDA: its result's shape or value is needed by the host, or comes from there."""
    name = func.overloadpacket.__name__
    if name in WAITS:
        return True
    if name == "repeat_interleave":
        return "Tensor" in str(func) and not kwargs.get("output_size")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        by_mask = any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None)
        of_scalar = name != "index" and args[2].dim() == 0
        return by_mask != of_scalar  # a scalar at a mask is filled in; one at indices is copied to the device first
    return False


def _caller() -> str:
    """Return the innermost function of torchvision or this package that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        for package in ("/torchvision/", "/trainer/"):
            _, found, path = frame.f_code.co_filename.rpartition(package)
            if found:
                return f"{package[1:]}{path}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"


def step_of(side: str, images: int, objects: int, options: argparse.Namespace) -> Callable[[], None]:
    """Return a function that does one training step."""
    options = argparse.Namespace(**{**vars(options), "batch": images})
    width, height = 4 * options.max_size, 3 * options.max_size
    samples = [sides.draw(objects, number, width, height) for number in range(images)]
    torch.manual_seed(0)
    model = ModelConfig(backbone=options.backbone, weights="none", rois_per_image=16)  # the counts do not depend on it
    network = build_model(model, sides.settings(options), sides.CLASSES).train()
    if side != "torchvision":
        from_boxes = side == BOXES
        trainable = Trainable(network, LossConfig(unmasked="masks" if from_boxes else "box"), fixed_shapes=True)
        cache_frozen_norms(network, torch.float32)
        teacher = frozen_copy(network) if from_boxes else None
        if from_boxes:
            samples = [without_half_of_masks(sample) for sample in samples]
        batch = TrainCollate(sides.settings(options, 0.0), 0, sides.CLASSES)(samples, 0)

        def losses() -> dict[str, Tensor]:
            return trainable(batch, teacher=teacher)  # type: ignore[no-any-return]
    else:
        loaded = sides.stock_load(samples, 0.0)

        def losses() -> dict[str, Tensor]:
            return sides.stock_losses(network, loaded, "cpu")

    # On CUDA, torchvision's reference script gets the form that updates many parameters at a time.
    fused = {"foreach": True} if side == "torchvision" else {"fused": True}
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, **fused)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            found = losses()
        torch.stack(list(found.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def without_half_of_masks(sample: Sample) -> Sample:
    """Return a sample in which every second object has a box only."""
    instances = (replace(i, segmentation=None) if n % 2 else i for n, i in enumerate(sample.instances))
    return replace(sample, instances=tuple(instances))


def count(side: str, images: int, objects: int, options: argparse.Namespace) -> StepCounter:
    """Count the second of two steps."""
    step = step_of(side, images, objects, options)
    step()
    with StepCounter() as counter:
        step()
    return counter


def main() -> int:
    """Count and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="resnet18", help="[resnet18]")
    parser.add_argument("--max-size", type=int, default=256, help="longer side of the network's input in pixels [256]")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="[float32]")
    parser.add_argument("--json", help="also write all counts to this file")
    options = parser.parse_args()
    options.device = "cpu"
    # What CUDA takes: levels apart by their coordinates, instead of one call per level.
    torchvision.ops.boxes.batched_nms = torchvision.ops.boxes._batched_nms_coordinate_trick
    print(
        f"{options.backbone}-FPN, {options.max_size} pixels, {options.precision}: kernels / synchronisations per step\n"
    )
    print("| | " + " | ".join(f"{images} images, {objects} objects each" for images, objects in CELLS) + " |")
    print("| --- |" + " ---: |" * len(CELLS))
    rows = []
    for side in SIDES:
        cells = []
        for images, objects in CELLS:
            counter = count(side, images, objects, options)
            cells.append(f"{counter.kernels.total()} / {counter.synchronisations.total()}")
            kinds = {"kernels": counter.kernels, "synchronisations": counter.synchronisations}
            rows.append({"side": side, "images": images, "objects": objects, **kinds})
        print(f"| {side} | {' | '.join(cells)} |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({**vars(options), "steps": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
