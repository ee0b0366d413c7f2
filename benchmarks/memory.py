"""Compute the GPU memory of a training step of each recipe, without a GPU.

    python benchmarks/memory.py                                   # all recipes
    python benchmarks/memory.py traffic fast --options train.precision=bf16

A step runs on the CPU in the form that a GPU runs, with 1 and with 2 images of max_size x min_size and 20 objects each,
and the bytes of all tensors that are alive are added up after each operation. The peak grows by the same bytes with
every further image. What a GPU needs in addition is not in it: the CUDA context (about 0.5 GB), workspaces of
convolutions, gaps between tensors, and with several GPUs a second copy of the gradients.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.training_sides import CLASSES, HEIGHT, draw
from trainer.config.schedule import stages
from trainer.config.settings import Config
from trainer.config.yaml_config import load_config
from trainer.data.collate import TrainCollate
from trainer.data.instances import Batch
from trainer.model.backbones import cache_frozen_norms, checkpoint_activations
from trainer.model.build import build_model
from trainer.model.freeze import set_trainable
from trainer.run.optim import make_optimizer
from trainer.step.trainable import Trainable

RECIPES = ["traffic", "traffic-coco", "coco", "lsj", "fast"]
OBJECTS = 20
SIZES = (12, 16, 24, 40, 80)  # of GPUs, in GB


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the storages that operations in its context make, while these are alive.

    Attributes:
        live: now.
        peak: the most until now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor, once, until its storage is freed."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = True
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, nbytes: int) -> None:
        self.live -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation and count its results."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result


def step_bytes(config: Config, images: int) -> int:
    """Return the most bytes that are alive during forward, backward and update of the stage that trains most."""
    config = replace(config, data=replace(config.data, batch_size=images, flip=0.0, copy_paste=0.0, scale_range=[1, 1]))
    torch.manual_seed(0)
    network = build_model(replace(config.model, weights="none"), config.data, CLASSES).train()
    if config.train.checkpoint_activations:
        checkpoint_activations(network)
    names = [set_trainable(network, stage.layers) for stage in stages(config.train)]
    most = max(range(len(names)), key=lambda number: len(names[number]))
    set_trainable(network, stages(config.train)[most].layers)
    step = Trainable(network, config.loss, fixed_shapes=True)
    is_bf16 = config.train.precision == "bf16"
    is_cast = is_bf16 and config.train.frozen_norms == "autocast"
    cache_frozen_norms(network, torch.bfloat16 if is_cast else torch.float32)
    optimizer = make_optimizer(step, config.optim)
    width = HEIGHT * config.data.max_size // config.data.min_size
    samples = [draw(OBJECTS, number, width) for number in range(images)]
    batch: Batch = TrainCollate(config.data, 0, CLASSES)(samples, 0)
    counter = LiveBytes()
    parameters = [*network.parameters(), *network.buffers()]
    held = [*parameters, *(value for state in optimizer.state.values() for value in state.values())]
    held += [value for value in vars(batch).values() if isinstance(value, Tensor)]
    for tensor in held:
        counter.add(tensor)
    with counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            losses = step(batch)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    average = sum(tensor.nbytes for tensor in parameters) if config.train.ema else 0
    return counter.peak + average


def main() -> int:
    """Compute and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help=f"[{' '.join(RECIPES)}]")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="settings over the recipes'")
    options = parser.parse_args()
    overrides = [tuple(word.split("=", 1)) for word in options.options]
    print(f"| recipe | per image, GB | images, GB | {' | '.join(f'images in {size} GB' for size in SIZES)} |")
    print(f"| --- | ---: | ---: |{' ---: |' * len(SIZES)}")
    for name in options.recipes:
        config = load_config(name, [(key, value) for key, value in overrides])
        one, two = (step_bytes(config, images) / 1e9 for images in (1, 2))
        each, rest = two - one, 2 * one - two
        batch = config.data.batch_size
        fitting = [max(0, int((0.9 * size - rest) / each)) for size in SIZES]
        needed = f"{batch}: {rest + batch * each:.1f}"
        print(f"| {name} | {each:.2f} | {needed} | {' | '.join(map(str, fitting))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
