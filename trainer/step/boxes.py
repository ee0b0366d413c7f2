"""Arithmetic on batched boxes: float32 [..., 4] x0, y0, x1, y1 in pixels.

The operations and their order are those of `torchvision.ops.boxes` and `torchvision.models.detection._utils.BoxCoder`,
so the results are the same to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

CHUNK_BYTES = 256 * 2**20  # of one table of overlaps; several such tables exist at a time


def area(boxes: Tensor) -> Tensor:
    """Return the areas, float32 [...], of boxes, float32 [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def area_inside(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Return the areas of the parts of boxes that are inside their images.

    Args:
        boxes: float32 [B, N, 4], or [1, N, 4] for the same boxes in every image.
        sizes: int64 [B, 2], height and width of each image.

    Returns:
        float32 [B, N] in pixels; 0 outside.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    height, width = sizes.to(boxes).split(1, dim=1)  # [B, 1] each
    across = torch.minimum(x1, width) - x0.clamp(min=0)
    down = torch.minimum(y1, height) - y0.clamp(min=0)
    return across.clamp_(min=0).mul_(down.clamp_(min=0))


def intersection(first: Tensor, second: Tensor) -> Tensor:
    """Return the area that every box of one set shares with every box of another.

    Args:
        first: float32 [B, G, 4].
        second: float32 [B, N, 4], or [1, N, 4] for the same boxes in every image.

    Returns:
        float32 [B, G, N] in pixels.
    """
    x0, y0, x1, y1 = (side[:, :, None] for side in first.unbind(-1))  # [B, G, 1] each
    u0, v0, u1, v1 = (side[:, None] for side in second.unbind(-1))  # [B, 1, N] each
    width = torch.minimum(x1, u1).sub_(torch.maximum(x0, u0)).clamp_(min=0)
    height = torch.minimum(y1, v1).sub_(torch.maximum(y0, v0)).clamp_(min=0)
    return width.mul_(height)


def decode(coder: BoxCoder, deltas: Tensor, anchors: Tensor) -> Tensor:
    """Apply predicted deltas to anchors, all float32 [..., 4]: `BoxCoder.decode_single`."""
    width, height = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
    x, y = anchors[..., 0] + 0.5 * width, anchors[..., 1] + 0.5 * height
    dx, dy, dw, dh = (part / weight for part, weight in zip(deltas.unbind(-1), coder.weights))
    x, y = dx * width + x, dy * height + y
    half_width = 0.5 * (dw.clamp(max=coder.bbox_xform_clip).exp() * width)
    half_height = 0.5 * (dh.clamp(max=coder.bbox_xform_clip).exp() * height)
    return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), dim=-1)


def encode(coder: BoxCoder, targets: Tensor, boxes: Tensor) -> Tensor:
    """Return the deltas that turn boxes into their targets, all float32 [..., 4]: `BoxCoder.encode_single`."""
    wx, wy, ww, wh = coder.weights
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    x, y = boxes[..., 0] + 0.5 * width, boxes[..., 1] + 0.5 * height
    target_width, target_height = targets[..., 2] - targets[..., 0], targets[..., 3] - targets[..., 1]
    target_x, target_y = targets[..., 0] + 0.5 * target_width, targets[..., 1] + 0.5 * target_height
    return torch.stack(
        (
            wx * (target_x - x) / width,
            wy * (target_y - y) / height,
            ww * torch.log(target_width / width),
            wh * torch.log(target_height / height),
        ),
        dim=-1,
    )


def take(values: Tensor, index: Tensor) -> Tensor:
    """Return entries of each image: values [B, N] or [B, N, D] at index, int64 [B, K]: [B, K] or [B, K, D]."""
    if values.dim() == 3:
        index = index[:, :, None].expand(-1, -1, values.shape[2])
    return values.gather(1, index)
