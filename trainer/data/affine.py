"""Rotation, shear and shift of an image and its instances: one matrix, and one resampling of the pixels.

A matrix is float64 [3, 3] and takes homogeneous coordinates (x, y, 1) of the decoded image, in pixels, to those of the
network's input. It contains the scaling and the crop as well.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trainer.config.settings import DataConfig
from trainer.data.augment import View
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, PREDICTED, Instances, is_large
from trainer.data.mask_bitmaps import extents, is_inside

Matrix = NDArray[np.float64]

# ImageNet's mean colour, with which the network normalises: there it is 0, as the padding of a batch is.
OUTSIDE = (124, 116, 104)


def random_turn(data: DataConfig, height: int, width: int, rng: np.random.Generator) -> Matrix:
    """Draw a shear along x, a rotation about the centre of `height` x `width` pixels, and then a shift.

    Each is uniform between minus and plus its setting, as in torchvision's `RandomAffine`; positive angles turn
    clockwise.
    """
    angle, shear = np.radians(rng.uniform(-1, 1, 2) * (data.rotate, data.shear))
    dx, dy = rng.uniform(-1, 1, 2) * data.translate * (width, height)
    cos, sin, tan = math.cos(angle), math.sin(angle), math.tan(shear)
    turn = np.array([[cos, -cos * tan - sin, 0], [sin, cos - sin * tan, 0], [0, 0, 1]])
    matrix: Matrix = shift(width / 2 + dx, height / 2 + dy) @ turn @ shift(-width / 2, -height / 2)
    return matrix


def matrix_of(view: View, height: int, width: int) -> Matrix:
    """Return the matrix of a view of an image of `height` x `width`."""
    matrix: Matrix = shift(-view.left, -view.top) @ np.diag([view.scaled[1] / width, view.scaled[0] / height, 1])
    return matrix


def shift(x: float, y: float) -> Matrix:
    """Return the matrix of a shift in pixels."""
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=np.float64)


def warp(image: Tensor, instances: Instances, matrix: Matrix, height: int, width: int) -> tuple[Tensor, Instances]:
    """Move an image, uint8 [3, H, W], and its instances into an image of `height` x `width`.

    Bilinear without antialiasing, as `resize`. What is outside of the image becomes OUTSIDE.
    """
    pixels = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    back = tuple(np.linalg.inv(matrix)[:2].ravel())
    bilinear, affine = Image.Resampling.BILINEAR, Image.Transform.AFFINE
    moved = pixels.transform((width, height), affine, back, bilinear, fillcolor=OUTSIDE)
    return torch.from_numpy(np.array(moved)).permute(2, 0, 1), warp_instances(instances, matrix, height, width)


def warp_instances(instances: Instances, matrix: Matrix, height: int, width: int) -> Instances:
    """Move instances into an image of `height` x `width`, and clip them to it as `Instances.crop` does.

    A bitmap is resampled into the box around its turned frame, inside the image, and gives the object's box; if nothing
    is turned, a predicted one does not, because the annotated box says more. The box of an object without a mask
    becomes that around the turned ellipse inside the box, because few objects reach into the corners (Kalra et al.,
    "Towards Rotation Invariance in Object Detection", ICCV 2021). That of a region becomes the box around the whole
    turned box, because anything in it may be an object.
    """
    has_mask, is_region = ((instances.flags & bits) != 0 for bits in (HAS_MASK, GROUP_OF | IGNORED))
    # A pixel beyond the image, because a RoI at its border reads that far.
    window = torch.tensor([-1.0, -1.0, width + 1, height + 1])
    frames = _inside(box_around(instances.frames, matrix), window)
    is_visible = ~has_mask | is_large(frames)
    instances, frames = instances.select(is_visible), frames[is_visible]
    has_mask, is_region = has_mask[is_visible], is_region[is_visible]
    frames = torch.where(has_mask[:, None], frames, 0)
    bitmaps = instances.bitmaps.clone()
    if has_mask.any():
        bitmaps[has_mask] = _resample(bitmaps[has_mask], instances.frames[has_mask], matrix, frames[has_mask])
    without = torch.where(
        is_region[:, None], box_around(instances.boxes, matrix), box_around(instances.boxes, matrix, ellipse=True)
    )
    seen = extents(bitmaps * is_inside(bitmaps, frames, height, width), frames)
    is_turned = bool(matrix[0, 1] or matrix[1, 0])
    by_mask = has_mask if is_turned else has_mask & ((instances.flags & PREDICTED) == 0)
    boxes = torch.where(by_mask[:, None], seen, without)
    moved = replace(instances, boxes=boxes, bitmaps=bitmaps, frames=frames)
    if is_turned:  # an object may not reach the sides of its new box
        moved = moved.loosened(torch.tensor(True))
    return moved.crop(0, 0, width, height)


def box_around(boxes: Tensor, matrix: Matrix, *, ellipse: bool = False) -> Tensor:
    """Return the boxes, float32 [M, 4], around turned boxes, or around the turned ellipses inside them."""
    linear, offset = torch.from_numpy(matrix[:2, :2]).float(), torch.from_numpy(matrix[:2, 2]).float()
    corner, opposite = boxes.split(2, dim=1)
    centre = (corner + opposite) / 2 @ linear.T + offset  # [M, 2]
    reach = (opposite - corner)[:, None] / 2 * linear  # [M, 2, 2], of x and y for each side
    half = torch.linalg.vector_norm(reach, ord=2 if ellipse else 1, dim=2)
    return torch.cat((centre - half, centre + half), dim=1)


def _inside(boxes: Tensor, window: Tensor) -> Tensor:
    """Return the parts of boxes that are inside a window, with negative sides where nothing is."""
    return torch.cat((boxes[:, :2].maximum(window[:2]), boxes[:, 2:].minimum(window[2:])), dim=1)


def _resample(bitmaps: Tensor, frames: Tensor, matrix: Matrix, into: Tensor) -> Tensor:
    """Read turned bitmaps, uint8 [M, m, m] in `frames`, at the cells of the frames `into`, float32 [M, 4]."""
    back = torch.from_numpy(np.linalg.inv(matrix)[:2]).float()  # [2, 3]
    (centre, half), (from_centre, from_half) = (_centre_and_half(part) for part in (into, frames))
    linear = back[:, :2] * half[:, None] / from_half[:, :, None]  # [M, 2, 2]
    offset = (centre @ back[:, :2].T + back[:, 2] - from_centre) / from_half  # [M, 2]
    side = bitmaps.shape[-1]
    grid = F.affine_grid(
        torch.cat((linear, offset[:, :, None]), dim=2), [len(bitmaps), 1, side, side], align_corners=False
    )
    values = F.grid_sample(bitmaps[:, None].float(), grid, align_corners=False)
    return values[:, 0].round_().to(torch.uint8)


def _centre_and_half(boxes: Tensor) -> tuple[Tensor, Tensor]:
    corner, opposite = boxes.split(2, dim=1)
    return (corner + opposite) / 2, (opposite - corner) / 2
