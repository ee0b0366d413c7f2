"""What a box says about the mask in it: two losses for objects that have a box and no mask.

A box constrains its mask in two ways (Tian et al., "BoxInst", CVPR 2021). The mask reaches all four sides of the box:
its projections on both axes fill the box. And neighbouring pixels of like colour are mostly both in the mask, or both
outside. The first alone is satisfied by a cross, the second by a filled box.

Masks are seen in RoIs that are wider than the box: in a tight one, a mask that fills the RoI would be right.
"""

from __future__ import annotations

from types import EllipsisType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from trainer.step.roi_align import Rois

WIDER = 0.1  # of a box's width and height, added on each side
LIKE = 10.0  # distance in CIELAB up to which two cells are of like colour
SMALLEST_INSIDE = 0.01  # a cell of which less is in the box is outside
COARSEST = 8.0  # pixels of the longer side of a cell; across larger ones, colours are averages of many things
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # of two by rows and columns: each pair of 3 x 3 once
SAMPLES = 2  # per side of a cell, to read colours

# Linear sRGB to XYZ of a D65 white point, divided by that white: https://www.w3.org/Graphics/Color/sRGB
_TO_XYZ = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0178, 0.1095, 0.8728))


class BoxInRoi(NamedTuple):
    """Where annotated boxes are in the S x S cells of their RoIs.

    Attributes:
        columns, rows: float32 [K, S], the share of each column and row of cells that is in the box.
        colours: float32 [K, 3, S, S], the image's colours in CIELAB.
        fine: bool [K], whether cells are small enough to compare their colours.
    """

    columns: Tensor
    rows: Tensor
    colours: Tensor
    fine: Tensor


def widen(boxes: Tensor) -> Tensor:
    """Return boxes, float32 [..., 4], extended by `WIDER` of their width and height on each side."""
    margin = WIDER * (boxes[..., 2:] - boxes[..., :2])
    return torch.cat((boxes[..., :2] - margin, boxes[..., 2:] + margin), dim=-1)


def box_in_roi(images: Tensor, rois: Rois, boxes: Tensor, size: int) -> BoxInRoi:
    """Locate boxes, float32 [K, 4], in `size` x `size` cells of K RoIs on images, uint8 [B, 3, H, W] RGB."""
    cells = (rois.boxes[:, 2:] - rois.boxes[:, :2]).clamp(min=1e-6) / size  # [K, 2] width, height
    columns, rows = (
        _covered(boxes[:, axis], boxes[:, axis + 2], rois.boxes[:, axis], cells[:, axis], size) for axis in (0, 1)
    )
    colours = to_lab(roi_align(images.float() / 255, rois.with_image(), size, 1.0, SAMPLES, aligned=True))
    return BoxInRoi(columns, rows, colours, cells.amax(dim=1) <= COARSEST)


def _covered(low: Tensor, high: Tensor, start: Tensor, cell: Tensor, size: int) -> Tensor:
    """Return the share of each of `size` cells from `start` on that is between `low` and `high`: [K, size]."""
    edges = start[:, None] + torch.arange(size + 1, device=start.device) * cell[:, None]
    inside = torch.minimum(torch.maximum(edges, low[:, None]), high[:, None])
    return inside.diff(dim=1) / cell[:, None]


def to_lab(rgb: Tensor) -> Tensor:
    """Convert colours from sRGB, float32 [K, 3, ...] of 0 to 1, to CIELAB; L is 0 to 100."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,kj...->ki...", linear.new_tensor(_TO_XYZ), linear)
    root = torch.where(xyz > 216 / 24389, xyz.clamp(min=216 / 24389) ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root.unbind(dim=1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def projection_loss(logits: Tensor, where: BoxInRoi) -> Tensor:
    """Return how far each mask is from reaching all sides of its box, and how much of it is outside.

    The sum of the dice losses of the mask's two projections, inside the box, against the box's own, and of the
    cross-entropy of the cells outside against background.

    Args:
        logits: float32 [K, S, S].
        where: of the same K RoIs.

    Returns:
        float32 [K], 0 or more.
    """
    share = where.rows[:, :, None] * where.columns[:, None, :]  # [K, S, S]
    inside, outside = share > 0.5, share < SMALLEST_INSIDE
    mask = logits.sigmoid() * inside
    across, down = (where.columns > 0.5).to(logits), (where.rows > 0.5).to(logits)
    projection = dice_loss(mask.amax(dim=1), across) + dice_loss(mask.amax(dim=2), down)
    background = F.softplus(logits) * outside  # cross-entropy with 0
    return projection + background.sum(dim=(1, 2)) / outside.sum(dim=(1, 2)).clamp(min=1)


def dice_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Return 1 - 2 sum(found wanted) / (sum(found^2) + sum(wanted^2)) of rows, float32 [K, S]: [K]."""
    both = (found * wanted).sum(dim=1)
    return 1 - 2 * both / (found.square().sum(dim=1) + wanted.square().sum(dim=1)).clamp(min=1e-6)


def affinity_loss(logits: Tensor, where: BoxInRoi) -> Tensor:
    """Return the mean of -log P(both or neither in the mask) over neighbours of like colour of which one is in the box.

    Args:
        logits: float32 [K, S, S].
        where: of the same K RoIs.

    Returns:
        float32 [K], 0 or more; 0 for a mask without such neighbours, or with cells that are too large to compare.
    """
    inside = (where.rows > 0.5)[:, :, None] & (where.columns > 0.5)[:, None, :]
    total, count = torch.zeros_like(logits[:, 0, 0]), torch.zeros_like(logits[:, 0, 0])
    yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
    for down, right in NEIGHBOURS:
        one, other = _pair(down, right)
        alike = (where.colours[one] - where.colours[other]).square().sum(dim=1) <= LIKE**2
        counted = (alike & (inside[one] | inside[other]) & where.fine[:, None, None]).to(logits)
        agree = torch.logaddexp(yes[one] + yes[other], no[one] + no[other])
        total = total - (agree * counted).sum(dim=(1, 2))
        count = count + counted.sum(dim=(1, 2))
    return total / count.clamp(min=1)


def _pair(down: int, right: int) -> tuple[tuple[EllipsisType | slice, ...], tuple[EllipsisType | slice, ...]]:
    """Return indices [..., S - down, S - |right|] of all cells that have a neighbour there, and of the neighbours."""
    upper, lower = slice(None, -down or None), slice(down, None)
    left, other = slice(None, -abs(right) or None), slice(abs(right), None)
    if right < 0:
        left, other = other, left
    return (..., upper, left), (..., lower, other)
