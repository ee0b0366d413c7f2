"""Copy-paste augmentation for masks that are bitmaps in frames.

Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", CVPR 2021. Objects
of one image are pasted over another at the same pixels. The covered part of the objects below is removed from their
bitmaps, and their boxes shrink to the visible part.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, KEPT, PREDICTED, Instances, is_large
from trainer.data.mask_bitmaps import extents

OBJECT_PROBABILITY = 0.5  # that an object of the donor is pasted, as in torchvision's reference
# An object with a smaller visible share is IGNORED: of its mask, or of its box where it has no mask (anything in the
# box may be the object, so the limit is higher).
MIN_VISIBLE_MASK = 0.1
MIN_VISIBLE_BOX = 0.5


def paste_some(
    image: Tensor,
    instances: Instances,
    donor: Tensor,
    donor_instances: Instances,
    probability: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Instances]:
    """With the given probability, `paste` a random half of the donor's objects with a mask of the source.

    A predicted mask may hold pixels around its object, and lack some of it.
    """
    if rng.random() >= probability:
        return image, instances
    usable = (donor_instances.flags & (HAS_MASK | GROUP_OF | IGNORED | PREDICTED)) == HAS_MASK
    chosen = usable & torch.from_numpy(rng.random(len(usable)) < OBJECT_PROBABILITY)
    return paste(image, instances, donor, donor_instances.select(chosen))


def paste(image: Tensor, instances: Instances, donor: Tensor, objects: Instances) -> tuple[Tensor, Instances]:
    """Paste objects of the donor, which have masks, over an image, at the same pixels, where both have pixels.

    Both images are uint8 [3, H, W], of any sizes. In the result the pasted instances are the last.
    """
    height, width = (min(a, b) for a, b in zip(image.shape[-2:], donor.shape[-2:]))
    objects = objects.crop(0, 0, width, height).without_outside(height, width)
    if len(objects) == 0:
        return image, instances
    cover = torch.zeros(image.shape[-2:])
    for bitmap, frame in zip(objects.bitmaps, objects.frames):
        _draw(cover[:height, :width], bitmap, frame)
    pasted = image.clone()
    opacity = cover[:height, :width]
    below, above = image[:, :height, :width].float(), donor[:, :height, :width].float()
    pasted[:, :height, :width] = (below + (above - below) * opacity).round_().to(torch.uint8)
    return pasted, Instances.concatenate([occlude(instances, cover), objects])


def _draw(cover: Tensor, bitmap: Tensor, frame: Tensor) -> None:
    """Raise the pixels of `cover`, float32 [H, W], to the share of each that the object covers, in place."""
    x0, y0, x1, y1 = frame.tolist()
    left, top = max(int(x0), 0), max(int(y0), 0)
    window = cover[top : int(y1) + 1, left : int(x1) + 1]
    if window.numel() == 0:
        return
    # Pixel centres of the window in the frame's coordinates, -1 to 1, as `grid_sample` takes them.
    x = (torch.arange(left, left + window.shape[1]) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(top, top + window.shape[0]) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)  # [h, w, 2]
    values = F.grid_sample(bitmap[None, None].float() / 255, grid[None], align_corners=False)[0, 0]  # [h, w]
    torch.maximum(window, values, out=window)


def occlude(instances: Instances, cover: Tensor) -> Instances:
    """Return what is visible of each instance under a layer of opacity `cover`, float32 [H, W], 0 to 1.

    Masks lose their covered cells, and their boxes shrink to the rest. An object with less than MIN_VISIBLE_MASK of its
    mask (MIN_VISIBLE_BOX of its box, without a mask) is IGNORED and keeps its box, because something of it may be
    visible anywhere in there. One without a mask of the source that is visible to less than KEPT is LOOSE. Group-of
    regions stay.
    """
    if len(instances) == 0:
        return instances
    has_mask = (instances.flags & HAS_MASK) != 0
    is_object = (instances.flags & GROUP_OF) == 0
    bitmaps = _uncovered_bitmaps(instances, has_mask, cover)
    area_before, area_after = (b.sum(dim=(1, 2), dtype=torch.float32) for b in (instances.bitmaps, bitmaps))
    covered_box = roi_align(cover[None, None], [instances.boxes], bitmaps.shape[1:], sampling_ratio=1, aligned=True)
    visible = torch.where(has_mask, area_after / area_before.clamp(min=1), 1 - covered_box.mean(dim=(1, 2, 3)))
    hidden = is_object & (visible < torch.where(has_mask, MIN_VISIBLE_MASK, MIN_VISIBLE_BOX))
    shrinks = has_mask & ~hidden
    boxes = torch.where(shrinks[:, None], _shrunk_boxes(instances, bitmaps), instances.boxes)
    flags = torch.where(hidden, instances.flags | IGNORED, instances.flags)
    remaining = replace(instances, boxes=boxes, bitmaps=bitmaps, flags=flags).loosened(visible < KEPT)
    return remaining.select(is_large(boxes) & ~(is_object & (visible <= 0)))


def _uncovered_bitmaps(instances: Instances, has_mask: Tensor, cover: Tensor) -> Tensor:
    """Multiply each cell of the bitmaps by its uncovered share; zeros without a mask: uint8 [M, m, m]."""
    side = instances.bitmaps.shape[-1]
    covered = roi_align(cover[None, None], [instances.frames], (side, side), sampling_ratio=2, aligned=True)[:, 0]
    return torch.where(has_mask[:, None, None], instances.bitmaps * (1 - covered), 0).round_().to(torch.uint8)


def _shrunk_boxes(instances: Instances, bitmaps: Tensor) -> Tensor:
    """Move the sides of boxes from which the mask has receded, never outwards: float32 [M, 4]."""
    before, after = (extents(b, instances.frames) for b in (instances.bitmaps, bitmaps))
    inwards = torch.cat((torch.maximum(after, instances.boxes)[:, :2], torch.minimum(after, instances.boxes)[:, 2:]), 1)
    return torch.where(after != before, inwards, instances.boxes)
