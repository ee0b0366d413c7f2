"""RoIAlign for training on a CPU: torchvision's forward pass, to the bit, and a quicker backward pass.

torchvision's backward pass adds every pixel of every RoI to scattered places of each channel in turn, in one thread:
a good part of a step on one core, and a larger one on several, which only the convolutions share. Seen with the
channels of a pixel side by side it is one sparse matrix product: what a pixel of the map gets is the weighted sum of
the bins that have read it (`torch.nn.functional.embedding_bag`). Sums are those of torchvision in another order, and
the same from run to run whatever the number of threads. `benchmarks/training.py` measures both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import MultiScaleRoIAlign


def pool(
    pooler: MultiScaleRoIAlign, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
) -> Tensor:
    """`pooler(features, boxes, sizes)`, whose gradient is found quickly on a CPU too.

    Args:
        pooler: torchvision's; one with an adaptive number of samples (`sampling_ratio` 0) is called as it is.
        features: float [B, C, H, W] maps by name.
        boxes: float32 [R_i, 4] x0, y0, x1, y1 of each image, in pixels.
        sizes: (height, width) of each image inside the padding.

    Returns:
        float [R, C, S, S], of all images' boxes in their order. Boxes get no gradient, as from torchvision.
    """
    maps = {name: features[name] for name in pooler.featmap_names if name in features}
    if pooler.sampling_ratio < 1 or any(of_level.device.type != "cpu" for of_level in maps.values()):
        pooled: Tensor = pooler(features, boxes, sizes)
    else:
        pooled = _Pool.apply(pooler, tuple(maps), boxes, sizes, *maps.values())  # type: ignore[no-untyped-call]
    return pooled


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pooler: MultiScaleRoIAlign,
        names: tuple[str, ...],
        boxes: list[Tensor],
        sizes: list[tuple[int, int]],
        *maps: Tensor,
    ) -> Tensor:
        pooled: Tensor = pooler(dict(zip(names, maps)), boxes, sizes)
        ctx.pooler, ctx.boxes = pooler, boxes
        ctx.maps = [(of_level.shape, of_level.dtype) for of_level in maps]
        return pooled

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pooler, shapes = ctx.pooler, [shape for shape, _ in ctx.maps]
        counts = [len(of_image) for of_image in ctx.boxes]
        sizes = [(shape[2], shape[3]) for shape in shapes]
        levels = _levels(pooler, ctx.boxes, len(shapes)).split(counts)
        # An image at a time bounds the memory.
        of_images = [
            _gradient(of_bins, boxes, own, pooler.scales, sizes, pooler.sampling_ratio)
            for of_bins, boxes, own in zip(gradient.split(counts), ctx.boxes, levels)
        ]
        pixels = torch.stack(of_images).split([shape[2] * shape[3] for shape in shapes], dim=1)
        of_maps = [
            of_level.unflatten(1, shape[2:]).permute(0, 3, 1, 2).to(dtype)
            for of_level, (shape, dtype) in zip(pixels, ctx.maps)
        ]
        return None, None, None, None, *of_maps


def _levels(pooler: MultiScaleRoIAlign, boxes: list[Tensor], count: int) -> Tensor:
    """int64 [R]: the map that each box is read from."""
    if count == 1 or pooler.map_levels is None:
        return torch.zeros(sum(map(len, boxes)), dtype=torch.int64)
    levels: Tensor = pooler.map_levels(boxes)
    return levels


def _gradient(
    gradient: Tensor,
    boxes: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    sizes: Sequence[tuple[int, int]],
    samples: int,
) -> Tensor:
    """What the maps of one image get.

    Args:
        gradient: float [R, C, S, S] of the bins.
        boxes: float32 [R, 4].
        levels: int64 [R], the map of each box.
        scales: pixels of each map to a pixel of the image.
        sizes: (height, width) of each map.
        samples: a bin's points a side.

    Returns:
        float32 [P, C]: the pixels of all maps, one after the other.
    """
    count, channels, side = gradient.shape[:3]
    heights, widths = torch.tensor(sizes).unbind(1)
    ends = torch.cumsum(heights * widths, 0)
    x0, y0, x1, y1 = (boxes.float() * torch.tensor(scales)[levels][:, None]).unbind(1)
    rows, of_rows = _read_along(y0, y1, heights[levels], side, samples)
    columns, of_columns = _read_along(x0, x1, widths[levels], side, samples)
    first = (ends - heights * widths)[levels]
    # [R, S, S, rows a bin reads, columns a bin reads]
    rows = (first[:, None, None] + rows * widths[levels][:, None, None])[:, :, None, :, None]
    pixels = (rows + columns[:, None, :, None, :]).flatten()
    weights = (of_rows[:, :, None, :, None] * of_columns[:, None, :, None, :]).flatten()

    pixels, order = pixels.sort(stable=True)
    bins = order // (2 * samples) ** 2
    starts = torch.searchsorted(pixels, torch.arange(int(ends[-1])))
    values = gradient.permute(0, 2, 3, 1).reshape(count * side * side, channels).float()
    return F.embedding_bag(bins, values, starts, mode="sum", per_sample_weights=weights[order])


def _read_along(start: Tensor, end: Tensor, limit: Tensor, side: int, samples: int) -> tuple[Tensor, Tensor]:
    """Which pixels the bins of boxes read along one axis, and with what weight, as torchvision's roi_align does
    (`aligned=False`): bilinearly at `samples` points a bin, none further than a pixel outside of the map.

    https://github.com/pytorch/vision/blob/main/torchvision/csrc/ops/cpu/roi_align_common.h

    Args:
        start, end: float32 [R] of each box on its map.
        limit: int64 [R] pixels of that map.
        side: bins.
        samples: points a bin.

    Returns:
        int64 and float32 [R, side, 2 samples].
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
