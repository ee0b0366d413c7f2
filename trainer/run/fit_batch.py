"""The largest batch that fits the memory of the GPUs (`data.batch_size` auto), found by trying."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from shards.common.text import counted
from trainer.config.schedule import stages
from trainer.config.settings import Config, ConfigError
from trainer.data.augment import repeated_sizes, round_up
from trainer.data.instances import HAS_MASK, Batch, padded_count
from trainer.data.mosaic import TILES
from trainer.model.freeze import set_trainable
from trainer.run.optim import frozen_copy, make_optimizer
from trainer.step.trainable import Trainable
from trainer.step.warm_up import empty_batch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torchvision.models.detection import MaskRCNN

log = logging.getLogger("trainer.run.fit_batch")

SHARE = 0.9  # of a GPU's memory; the rest is for gaps between tensors, and for batches of other shapes
MOST = 512  # images per batch


def largest_batch(config: Config, network: MaskRCNN, classes: int, accelerator: Accelerator) -> int:
    """Return the most images per batch that fit on every rank; every rank must call this.

    ConfigError, on all ranks, without a GPU, or if not a single image fits.

    Args:
        config: of the run.
        network: to try with; its weights change.
        classes: of the network, with the background.
        accelerator: of the run.
    """
    device = accelerator.device
    if device.type != "cuda":
        raise ConfigError("data.batch_size is auto, which needs a GPU, and this process has none: give a number")
    torch.cuda.set_per_process_memory_fraction(SHARE, device)
    found = largest(lambda images: fits(config, network, classes, images, accelerator))
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    found = int(accelerator.gather(torch.tensor([found], device=device)).min())
    if found == 0:
        raise ConfigError("data.batch_size is auto, and not even one image fits the GPU: lower data.max_size")
    log.info("data.batch_size auto: %s per batch on each GPU", counted(found, "image"))
    return found


def largest(is_possible: Callable[[int], bool]) -> int:
    """Return the largest possible number up to MOST, or one that is less than an eighth smaller; 0 if 1 is not."""
    low, high = 0, 1
    while high <= MOST and is_possible(high):
        low, high = high, 2 * high
    while low < MOST and high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if is_possible(middle) else (low, middle)
    return low


def fits(config: Config, network: MaskRCNN, classes: int, images: int, accelerator: Accelerator) -> bool:
    """Return whether two steps of the stage that trains most fit the memory, not compiled, on this rank alone."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        most = max(stages(config.train), key=lambda stage: len(set_trainable(network, stage.layers)))
        set_trainable(network, most.layers)
        step = Trainable(network, config.loss, mask_rois=config.model.mask_rois).train().to(accelerator.device)
        step.zero_grad(set_to_none=True)
        optimizer = make_optimizer(step, config.optim)
        # What else is on the device during a run: the average of the weights, and DDP's copy of the gradients.
        average = frozen_copy(network) if config.train.ema else None
        held = [torch.empty_like(parameter) for parameter in step.parameters() if accelerator.num_processes > 1]
        batch = full_batch(config, images, classes).to(accelerator.device)
        for _ in range(2):
            with accelerator.autocast():
                losses = step(batch, teacher=average if config.has_teacher else None)
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
        del held, average
    except torch.OutOfMemoryError:
        return False
    return True


def full_batch(config: Config, images: int, classes: int) -> Batch:
    """Return a batch of the largest shape with as many objects as an image may have, each with a mask."""
    data = config.data
    height, width = max(repeated_sizes(data) or [(round_up(data.max_size),) * 2])
    objects = data.max_instances or 100
    batch = empty_batch(images, height, width, padded_count(objects), classes, tiles=TILES if data.mosaic else 1)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand((images, objects, 2), generator=generator) * 0.8
    size = torch.rand((images, objects, 2), generator=generator) * 0.15 + 0.05
    boxes = batch.boxes.clone()
    boxes[:, :objects] = torch.cat((corner, corner + size), dim=2) * torch.tensor([width, height] * 2)
    labels = torch.zeros_like(batch.labels)
    labels[:, :objects] = 1
    return replace(batch, boxes=boxes, frames=boxes, labels=labels, flags=(labels * HAS_MASK).to(torch.uint8))
