"""RoIAlign of all levels of an FPN, in two forms with the same result.

- `pool_in_fixed_shapes` reads every level for every RoI, with the RoIs of other levels moved far outside, where
  torchvision's `roi_align` reads zeros, and adds the results. No shape depends on the RoIs, so nothing waits for a GPU.
- `pool_on_cpu` reads each RoI once, with a faster backward pass. torchvision's adds every pixel of every RoI to
  scattered places of one channel after the other, in a single thread. With the channels of a pixel next to each other,
  it is one sparse matrix product: the gradient of a pixel is the weighted sum of the gradients of the bins that read it
  (`torch.nn.functional.embedding_bag`). The order of the sums differs from torchvision's; it is the same in every run,
  whatever the number of threads. `benchmarks/training.py` measures both.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import MultiScaleRoIAlign, roi_align

from trainer.step.boxes import area

OUTSIDE = -1e5  # pixels; further from the image than any map's border


class Rois(NamedTuple):
    """RoIs of a batch.

    Attributes:
        boxes: float32 [K, 4] x0, y0, x1, y1 in pixels.
        images: int64 [K], which image each belongs to; ascending for `pool_on_cpu`.
    """

    boxes: Tensor
    images: Tensor

    def with_image(self) -> Tensor:
        """Return the boxes as torchvision's operator takes them, float32 [K, 5] with the image in front."""
        return torch.cat((self.images[:, None].to(self.boxes), self.boxes), dim=1)


def levels_of(pooler: MultiScaleRoIAlign, boxes: Tensor) -> Tensor:
    """Return the level that each box is read from, float32 [K]: equation 1 of the FPN paper, as in torchvision."""
    mapper = pooler.map_levels
    level = torch.floor(mapper.lvl0 + torch.log2(torch.sqrt(area(boxes)) / mapper.s0) + mapper.eps)
    of_boxes: Tensor = level.clamp(mapper.k_min, mapper.k_max) - mapper.k_min
    return of_boxes


def pool_in_fixed_shapes(pooler: MultiScaleRoIAlign, maps: Sequence[Tensor], rois: Rois) -> Tensor:
    """Read RoIs from `maps`, [B, C, h, w] per level: [K, C, S, S]. As in torchvision, boxes get no gradient."""
    levels = levels_of(pooler, rois.boxes)
    parts = []
    for level, (of_level, scale) in enumerate(zip(maps, pooler.scales)):
        own = Rois(rois.boxes.masked_fill((levels != level)[:, None], OUTSIDE), rois.images)
        parts.append(roi_align(of_level, own.with_image(), pooler.output_size, scale, pooler.sampling_ratio))
    pooled: Tensor = functools.reduce(torch.add, parts)
    return pooled


def pool_on_cpu(pooler: MultiScaleRoIAlign, maps: Sequence[Tensor], rois: Rois) -> Tensor:
    """Read RoIs as `pool_in_fixed_shapes`, with the faster backward pass."""
    pooled: Tensor = _Pool.apply(pooler, rois, *maps)  # type: ignore[no-untyped-call]
    return pooled


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooler: MultiScaleRoIAlign, rois: Rois, *maps: Tensor) -> Tensor:
        levels = levels_of(pooler, rois.boxes).long()
        boxes = rois.with_image()
        pooled = maps[0].new_zeros((len(boxes), maps[0].shape[1], *pooler.output_size))
        for level, (of_level, scale) in enumerate(zip(maps, pooler.scales)):
            index = torch.where(levels == level)[0]
            part = roi_align(of_level, boxes[index], pooler.output_size, scale, pooler.sampling_ratio)
            pooled[index] = part.to(pooled.dtype)  # under autocast, maps may have different dtypes
        ctx.pooler, ctx.rois, ctx.levels = pooler, rois, levels
        ctx.maps = [(of_level.shape, of_level.dtype) for of_level in maps]
        return pooled

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pooler, shapes = ctx.pooler, [shape for shape, _ in ctx.maps]
        counts = torch.bincount(ctx.rois.images, minlength=shapes[0][0]).tolist()
        sizes = [(shape[2], shape[3]) for shape in shapes]
        # One image at a time, to bound the memory.
        of_images = [
            _gradient(of_bins, boxes, own, pooler.scales, sizes, pooler.sampling_ratio)
            for of_bins, boxes, own in zip(
                gradient.split(counts), ctx.rois.boxes.split(counts), ctx.levels.split(counts)
            )
        ]
        pixels = torch.stack(of_images).split([shape[2] * shape[3] for shape in shapes], dim=1)
        of_maps = [
            of_level.unflatten(1, shape[2:]).permute(0, 3, 1, 2).to(dtype)
            for of_level, (shape, dtype) in zip(pixels, ctx.maps)
        ]
        return None, None, *of_maps


def _gradient(
    gradient: Tensor,
    boxes: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    sizes: Sequence[tuple[int, int]],
    samples: int,
) -> Tensor:
    """Compute the gradient of the maps of one image, float32 [P, C]: the pixels of all maps, one after the other.

    `gradient`, [R, C, S, S], is that of the bins, `levels` the map of each box, [R, 4] in pixels of the image; `scales`
    are pixels of each map per pixel of the image, `samples` the sampling points per side of a bin.
    """
    count, channels, side = gradient.shape[:3]
    heights, widths = torch.tensor(sizes).unbind(1)
    ends = torch.cumsum(heights * widths, 0)
    x0, y0, x1, y1 = (boxes.float() * torch.tensor(scales)[levels][:, None]).unbind(1)
    rows, row_weights = _bilinear_weights(y0, y1, heights[levels], side, samples)
    columns, column_weights = _bilinear_weights(x0, x1, widths[levels], side, samples)
    first = (ends - heights * widths)[levels]
    # [R, S, S, rows that a bin reads, columns that a bin reads]
    rows = (first[:, None, None] + rows * widths[levels][:, None, None])[:, :, None, :, None]
    pixels = (rows + columns[:, None, :, None, :]).flatten()
    weights = (row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]).flatten()

    pixels, order = pixels.sort(stable=True)
    bins = order // (2 * samples) ** 2
    starts = torch.searchsorted(pixels, torch.arange(int(ends[-1])))
    values = gradient.permute(0, 2, 3, 1).reshape(count * side * side, channels).float()
    return F.embedding_bag(bins, values, starts, mode="sum", per_sample_weights=weights[order])


def _bilinear_weights(start: Tensor, end: Tensor, limit: Tensor, side: int, samples: int) -> tuple[Tensor, Tensor]:
    """Return which pixels the bins of boxes read along one axis, and with what weight.

    Bins are read as in torchvision's roi_align with `aligned=False`: bilinearly at `samples` points per bin, ignoring
    points that are further than a pixel outside the map.
    https://github.com/pytorch/vision/blob/main/torchvision/csrc/ops/cpu/roi_align_common.h

    A box, of `side` bins, extends from `start` to `end`, float32 [R], on its map of `limit` pixels, int64 [R].

    Returns:
        int64 pixels and float32 weights, [R, side, 2 samples] each.
    """
    bin_size = (end - start).clamp(min=1)[:, None, None] / side
    bins, points = torch.arange(side)[:, None], torch.arange(samples)
    places = start[:, None, None] + bins * bin_size + (points + 0.5) * bin_size / samples
    limit = limit[:, None, None]
    inside = (places >= -1) & (places <= limit)
    places = places.clamp(min=0).minimum((limit - 1).to(places))
    low = places.floor()
    share = places - low
    low = low.long().minimum(limit - 1)
    high = (low + 1).minimum(limit - 1)
    weights = torch.cat((1 - share, share), dim=-1) * inside.repeat(1, 1, 2) / samples
    return torch.cat((low, high), dim=-1), weights
