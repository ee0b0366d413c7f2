"""Copy-paste (Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", 2021)
for masks that are bitmaps in frames.

Objects of one image are pasted over another at the places they have. What they cover is taken out of the bitmaps of
the objects below, whose boxes shrink to what is still seen of them.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from trainer.data import instances as geometry
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, MIN_SIDE, Instances

CHOSEN = 0.5  # probability of each object, as in torchvision's reference
SEEN_MASK = 0.1  # an object of which less of the mask is left is neither object nor background
SEEN_BOX = 0.5  # likewise of the box of an object without a mask, of which nobody knows where in the box it is


def paste_some(
    image: Tensor,
    instances: Instances,
    donor: Tensor,
    donor_instances: Instances,
    probability: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Instances]:
    """Paste a random half of the donor's objects, with a probability; those without a mask cannot be.

    Args:
        image, instances: uint8 [3, H, W] and what is on it; left as they are.
        donor, donor_instances: likewise, of any size.
        probability: that anything is pasted.
        rng: draws whether, and which.
    """
    if rng.random() >= probability:
        return image, instances
    whole = (donor_instances.flags & (HAS_MASK | GROUP_OF | IGNORED)) == HAS_MASK
    chosen = whole & torch.from_numpy(rng.random(len(whole)) < CHOSEN)
    return paste(image, instances, donor, donor_instances.select(chosen))


def paste(image: Tensor, instances: Instances, donor: Tensor, objects: Instances) -> tuple[Tensor, Instances]:
    """Paste objects over an image, at the same pixels.

    Args:
        image, instances: uint8 [3, H, W] and what is on it; left as they are.
        donor: uint8 [3, h, w], the image that the objects are on.
        objects: with a mask each.

    Returns:
        The image and its instances, first those that were there. A new box stands in both images.
    """
    height, width = (min(a, b) for a, b in zip(image.shape[-2:], donor.shape[-2:]))
    objects = geometry.crop(objects, 0, 0, width, height)
    if len(objects) == 0:
        return image, instances
    cover = torch.zeros(image.shape[-2:])
    for bitmap, frame in zip(objects.bitmaps, objects.frames):
        _draw(cover[:height, :width], bitmap, frame)
    pasted = image.clone()
    share = cover[:height, :width]
    below, above = image[:, :height, :width].float(), donor[:, :height, :width].float()
    pasted[:, :height, :width] = (below + (above - below) * share).round_().to(torch.uint8)
    left = occlude(instances, cover)
    return pasted, Instances(
        **{item.name: torch.cat((getattr(left, item.name), getattr(objects, item.name))) for item in fields(Instances)}
    )


def _draw(cover: Tensor, bitmap: Tensor, frame: Tensor) -> None:
    """Raise the pixels of `cover`, float [H, W], to how much of each the object covers; in place."""
    x0, y0, x1, y1 = frame.tolist()
    left, top = max(int(x0), 0), max(int(y0), 0)
    window = cover[top : int(y1) + 1, left : int(x1) + 1]
    if window.numel() == 0:
        return
    # Centres of the window's pixels, from -1 to 1 in the frame.
    x = (torch.arange(left, left + window.shape[1]) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(top, top + window.shape[0]) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
    values = F.grid_sample(bitmap[None, None].float() / 255, grid[None], align_corners=False)[0, 0]
    torch.maximum(window, values, out=window)


def occlude(instances: Instances, cover: Tensor) -> Instances:
    """The instances under something opaque.

    Args:
        instances: in pixels of `cover`; left as they are.
        cover: float32 [H, W], 0 to 1.

    Returns:
        Those of which something is seen; of which too little to be learned from are IGNORED. Group-of regions stay.
    """
    if len(instances) == 0:
        return instances
    has_mask = (instances.flags & HAS_MASK) != 0
    side = instances.bitmaps.shape[-1]
    # How much of each cell, and of each box without a mask, is covered.
    hidden = roi_align(cover[None, None], [instances.frames], (side, side), sampling_ratio=2, aligned=True)[:, 0]
    of_box = roi_align(cover[None, None], [instances.boxes], (side, side), sampling_ratio=1, aligned=True)
    bitmaps = torch.where(has_mask[:, None, None], instances.bitmaps * (1 - hidden), 0).round_().to(torch.uint8)
    before, after = (b.sum(dim=(1, 2), dtype=torch.float32) for b in (instances.bitmaps, bitmaps))
    seen = torch.where(has_mask, after / before.clamp(min=1), 1 - of_box.mean(dim=(1, 2, 3)))
    # Only the sides on which the mask has receded move, and never outwards.
    was, now = (_extent(b, instances.frames) for b in (instances.bitmaps, bitmaps))
    inwards = torch.cat((torch.maximum(now, instances.boxes)[:, :2], torch.minimum(now, instances.boxes)[:, 2:]), dim=1)
    boxes = torch.where(has_mask[:, None] & (now != was), inwards, instances.boxes)
    object_ = (instances.flags & GROUP_OF) == 0
    faint = object_ & (seen < torch.where(has_mask, SEEN_MASK, SEEN_BOX))
    flags = torch.where(faint, instances.flags | IGNORED, instances.flags)
    # What is ignored keeps the box that it had: something of it may show anywhere in there.
    boxes = torch.where(faint[:, None], instances.boxes, boxes)
    large = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(dim=1)
    return replace(instances, boxes=boxes, bitmaps=bitmaps, flags=flags).select(large & ~(object_ & (seen <= 0)))


def _extent(bitmaps: Tensor, frames: Tensor) -> Tensor:
    """The box, float32 [M, 4], in which a bitmap is set; empty where it is set nowhere."""
    side = bitmaps.shape[-1]
    ends = []
    for dim in (1, 2):  # over the rows: x; over the columns: y
        line = (bitmaps >= 128).any(dim=dim)
        first = line.int().argmax(dim=1)
        last = side - line.flip(1).int().argmax(dim=1)
        ends.append((first, torch.where(line.any(dim=1), last, first)))
    (x0, x1), (y0, y1) = ends
    corner, size = frames[:, :2], frames[:, 2:] - frames[:, :2]
    cells = torch.stack((x0, y0, x1, y1), dim=1).to(frames)
    return corner.repeat(1, 2) + cells / side * size.repeat(1, 2)
