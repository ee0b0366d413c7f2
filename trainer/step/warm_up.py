"""Compiling the step before training, for every shape that it may meet."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torchvision.models.detection import MaskRCNN

from shards.common.text import counted
from trainer.config.settings import DataConfig
from trainer.data.augment import repeated_sizes
from trainer.data.instances import HAS_MASK, PIXEL, Batch, padded_count
from trainer.data.mask_bitmaps import BITMAP
from trainer.data.mosaic import TILES
from trainer.step.ground_truth import ground_truth_of
from trainer.step.trainable import Trainable, annotated_rois

log = logging.getLogger("trainer.step.warm_up")


def warm_up(
    step: Trainable, data: DataConfig, classes: int, device: torch.device, teacher: MaskRCNN | None = None
) -> None:
    """Run forward and backward passes on empty batches of every shape; no weight or statistic changes.

    Only shapes that repeat are run: with `data.resize` shortest, of which every batch may have its own, none is.

    Args:
        step: compiled, on `device`.
        data: determines the shapes.
        classes: of the network, with the background.
        device: that of training.
        teacher: any network of the kind, if training has a teacher.
    """
    began = time.perf_counter()
    shapes = [(*size, rows) for size in repeated_sizes(data) for rows in row_counts(data.max_instances)]
    buffers = [(buffer, buffer.clone()) for buffer in step.network.buffers()]
    for height, width, rows in shapes:
        batch = empty_batch(data.batch_size, height, width, rows, classes, tiles=TILES if data.mosaic else 1)
        run_all_shapes(step, batch.to(device), teacher)
    step.zero_grad(set_to_none=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    if shapes:
        log.info("compiled the step for %s in %.0f s", counted(len(shapes), "shape"), time.perf_counter() - began)


def run_all_shapes(step: Trainable, batch: Batch, teacher: MaskRCNN | None = None) -> None:
    """Run the parts of the step forward and backward, the mask branch on every number of RoIs.

    It is one graph to compile, but a CUDA graph for each number.
    """
    truth, keys = ground_truth_of(batch, step.loss), step.draw_keys(batch)
    maps, logits, deltas = step.backbone_stage(batch.images, batch.sizes)
    rois, found = step.proposal_stage(logits, deltas, batch.sizes, step.anchors_of(batch), truth, keys)
    losses = [*found.values(), *step.box_branch(maps, rois, batch.tiles, batch.verified).values()]
    torch.stack(losses).sum().backward()
    leaves = [of_level.detach().requires_grad_(of_level.requires_grad) for of_level in maps]
    masked = rois if step.mask_rois == "proposals" else annotated_rois(truth)
    for slots in step.mask_slots(batch):
        targets, expected, where = step.mask_targets(batch, masked, slots)
        taught = step.taught_masks(teacher, batch, targets)
        loss = torch.stack([*step.mask_branch(leaves, targets, expected, where, taught).values()]).sum()
        if loss.requires_grad:
            loss.backward()
        del loss  # frees what its backward pass would need, so that warming up takes no more memory than training


def row_counts(limit: int) -> Sequence[int]:
    """Return the numbers of rows that annotations are padded to, up to that of `limit` objects."""
    counts = [padded_count(0)]
    while counts[-1] < padded_count(limit):
        counts.append(2 * counts[-1])
    return counts


def empty_batch(images: int, height: int, width: int, rows: int, classes: int, tiles: int = 1) -> Batch:
    """Return a batch of black images with one object each, that fills the image."""
    labels = torch.zeros((images, rows), dtype=torch.int64)
    boxes = torch.tensor(PIXEL).repeat(images, rows, 1)
    labels[:, 0], boxes[:, 0] = 1, torch.tensor([0.0, 0.0, float(width), float(height)])
    return Batch(
        images=torch.zeros((images, height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
        sizes=torch.tensor([[height, width]]).repeat(images, 1),
        boxes=boxes,
        labels=labels,
        flags=(labels * HAS_MASK).to(torch.uint8),
        bitmaps=torch.zeros((images, rows, BITMAP, BITMAP), dtype=torch.uint8),
        frames=boxes,
        tiles=boxes[:, :1].repeat(1, tiles, 1),
        verified=torch.ones((images, tiles, classes), dtype=torch.bool),
        image_ids=("",) * images,
    )
