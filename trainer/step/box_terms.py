"""What a box says about the mask in it: losses for objects without a mask of the source.

A box constrains its mask in two ways (Tian et al., "BoxInst", CVPR 2021). The mask reaches all four sides of the box:
its projections on both axes fill the box. And neighbouring pixels of like colour are mostly both in the mask, or both
outside. The first alone is satisfied by a cross, the second by a filled box. What neither decides, such as a car's
windows, is more often in the mask than not where it is near the middle of the box. From there on, the average of the
network's weights teaches it the masks that it is sure of (Cheng et al., "BoxTeacher", CVPR 2023).

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
CORE = 0.75  # radius of the middle of a box, of the ellipse in it
IN_CORE = 0.75  # share of the cells there that are in the mask; benchmarks/masks_of_photographs.py measures it
CORE_WEIGHT = 0.3
SURE = 0.7  # probability, of being in the mask or of not being in it, from which on a cell is taught

# Linear sRGB to XYZ of a D65 white point, divided by that white: https://www.w3.org/Graphics/Color/sRGB
_TO_XYZ = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0178, 0.1095, 0.8728))


class BoxInRoi(NamedTuple):
    """Where annotated boxes are in the S x S cells of their RoIs.

    Attributes:
        columns, rows: float32 [K, S], the share of each column and row of cells that is in the box.
        radius: float32 [K, S, S], distance of each cell from the box's centre; 1 on the ellipse that touches all sides.
        colours: float32 [K, 3, S, S], the image's colours in CIELAB.
        fine: bool [K], whether cells are small enough to compare their colours.
    """

    columns: Tensor
    rows: Tensor
    radius: Tensor
    colours: Tensor
    fine: Tensor

    @property
    def inside(self) -> Tensor:
        """Whether each cell is in the box by more than half of its row and column: bool [K, S, S]."""
        return (self.rows > 0.5)[:, :, None] & (self.columns > 0.5)[:, None, :]

    @property
    def outside(self) -> Tensor:
        """Whether less than `SMALLEST_INSIDE` of each cell is in the box: bool [K, S, S]."""
        return self.rows[:, :, None] * self.columns[:, None, :] < SMALLEST_INSIDE


def widen(boxes: Tensor) -> Tensor:
    """Return boxes, float32 [..., 4], extended by `WIDER` of their width and height on each side."""
    margin = WIDER * (boxes[..., 2:] - boxes[..., :2])
    return torch.cat((boxes[..., :2] - margin, boxes[..., 2:] + margin), dim=-1)


def box_in_roi(images: Tensor, rois: Rois, boxes: Tensor, size: int) -> BoxInRoi:
    """Locate boxes, float32 [K, 4], in `size` x `size` cells of K RoIs on images, uint8 [B, 3, H, W] RGB."""
    cells = (rois.boxes[:, 2:] - rois.boxes[:, :2]).clamp(min=1e-6) / size  # [K, 2] width, height
    (columns, x), (rows, y) = (
        _along(boxes[:, axis], boxes[:, axis + 2], rois.boxes[:, axis], cells[:, axis], size) for axis in (0, 1)
    )
    radius = torch.hypot(y[:, :, None], x[:, None, :])
    colours = to_lab(roi_align(images.float() / 255, rois.with_image(), size, 1.0, SAMPLES, aligned=True))
    return BoxInRoi(columns, rows, radius, colours, cells.amax(dim=1) <= COARSEST)


def _along(low: Tensor, high: Tensor, start: Tensor, cell: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Locate `size` cells from `start` on, along the extent of a box from `low` to `high`: two of [K, size].

    The first is the share of each cell that is inside, the second its centre's place, from -1 at `low` to 1 at `high`.
    """
    edges = start[:, None] + torch.arange(size + 1, device=start.device) * cell[:, None]
    inside = torch.minimum(torch.maximum(edges, low[:, None]), high[:, None])
    centres = (edges[:, :-1] + edges[:, 1:]) / 2
    place = (2 * centres - (low + high)[:, None]) / (high - low)[:, None].clamp(min=1e-6)
    return inside.diff(dim=1) / cell[:, None], place


def to_lab(rgb: Tensor) -> Tensor:
    """Convert colours from sRGB, float32 [K, 3, ...] of 0 to 1, to CIELAB; L is 0 to 100."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,kj...->ki...", linear.new_tensor(_TO_XYZ), linear)
    root = torch.where(xyz > 216 / 24389, xyz.clamp(min=216 / 24389) ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root.unbind(dim=1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def inside_box_loss(logits: Tensor, where: BoxInRoi) -> Tensor:
    """Return `projection_loss` and `CORE_WEIGHT` times `core_loss` together, float32 [K]."""
    return projection_loss(logits, where) + CORE_WEIGHT * core_loss(logits, where)


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
    mask = logits.sigmoid() * where.inside
    across, down = (where.columns > 0.5).to(logits), (where.rows > 0.5).to(logits)
    projection = dice_loss(mask.amax(dim=1), across) + dice_loss(mask.amax(dim=2), down)
    return projection + _mean_of_cells(F.softplus(logits), where.outside)  # cross-entropy with 0


def core_loss(logits: Tensor, where: BoxInRoi) -> Tensor:
    """Return the cross-entropy of the cells in the middle of each box with the share that are usually in the mask.

    The arguments are those of `projection_loss`; the result is float32 [K], least where the network says that share.
    """
    core = where.inside & (where.radius < CORE)
    usual = torch.full_like(logits, IN_CORE)
    return _mean_of_cells(F.binary_cross_entropy_with_logits(logits, usual, reduction="none"), core)


def teacher_loss(logits: Tensor, taught: Tensor, where: BoxInRoi) -> Tensor:
    """Return the cross-entropy of the cells in each box with a teacher's mask, of those that the teacher is sure of.

    It is divided by all cells in the box, and multiplied by the mean probability of the teacher's mask in it, so that
    masks of which it is not sure count less.

    Args:
        logits: float32 [K, S, S].
        taught: float32 [K, S, S], the teacher's probabilities.
        where: of the same K RoIs.

    Returns:
        float32 [K], 0 or more.
    """
    mask, inside = taught > 0.5, where.inside
    losses = F.binary_cross_entropy_with_logits(logits, mask.to(logits), reduction="none")
    sure = torch.maximum(taught, 1 - taught) >= SURE
    return _mean_of_cells(taught, mask & inside) * _mean_of_cells(losses * sure, inside)


def _mean_of_cells(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of the values, float32 [K, S, S], over the counted cells of each mask: [K]; 0 over none."""
    return (values * counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2)).clamp(min=1)


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
    inside = where.inside
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
