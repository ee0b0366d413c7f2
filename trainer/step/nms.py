"""Non-maximum suppression of all images and levels in one call that returns a mask.

`nms_keep` is one operation for autograd, `torch.compile` and a profiler. On a CPU it is torchvision's `nms` on every
image and level; on CUDA a Triton kernel, if Triton is there and the kernel agrees with `keep_by_fixed_point` on random
boxes when it is first used, and otherwise `keep_by_fixed_point`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from trainer.step.boxes import CHUNK_BYTES, area, intersection

log = logging.getLogger("trainer.step.nms")


@torch.library.custom_op("maskstream::nms_keep", mutates_args=())
def nms_keep(boxes: Tensor, scores: Tensor, valid: Tensor, sizes: Sequence[int], threshold: float) -> Tensor:
    """Return which boxes remain: those that overlap no better remaining box of their group by more than `threshold`.

    Args:
        boxes: float32 [B, N, 4] x0, y0, x1, y1; the groups of an image one after the other.
        scores: float32 [B, N], descending within each group.
        valid: bool [B, N]; other boxes neither remain nor suppress any.
        sizes: number of boxes of each group; their sum is N.
        threshold: IoU above which the box with the lower score is dropped.

    Returns:
        bool [B, N].
    """
    keep = torch.zeros_like(valid)
    start = 0
    for size in sizes:
        for image in range(len(boxes)):
            index = valid[image, start : start + size].nonzero()[:, 0] + start
            keep[image, index[nms(boxes[image, index], scores[image, index], threshold)]] = True
        start += size
    return keep


@nms_keep.register_fake
def _(boxes: Tensor, scores: Tensor, valid: Tensor, sizes: Sequence[int], threshold: float) -> Tensor:
    return torch.empty_like(valid)


@nms_keep.register_kernel("cuda")
def _(boxes: Tensor, scores: Tensor, valid: Tensor, sizes: Sequence[int], threshold: float) -> Tensor:
    with torch.cuda.device(boxes.device):  # Triton runs on the current device
        if triton_agrees(boxes.device):
            from trainer.step.triton_nms import keep_by_triton

            return keep_by_triton(boxes, valid, sizes, threshold)
        return keep_by_fixed_point(boxes, valid, sizes, threshold)


def keep_by_fixed_point(boxes: Tensor, valid: Tensor, sizes: Sequence[int], threshold: float) -> Tensor:
    """Compute `nms_keep` by repetition: keep the boxes that no box of the last round's suppresses.

    A box depends only on better ones, so every round settles at least one more box, and what a round leaves unchanged
    is the result. In practice that takes 3 to 8 rounds. Each waits for the device. The images are processed a few at a
    time, so that no table exceeds CHUNK_BYTES.
    """
    parts = []
    for own, there in zip(boxes.split(list(sizes), dim=1), valid.split(list(sizes), dim=1)):
        at_a_time = max(1, CHUNK_BYTES // (4 * max(own.shape[1], 1) ** 2))
        chunks = zip(own.split(at_a_time), there.split(at_a_time))
        parts.append(torch.cat([_keep_in_group(*chunk, threshold) for chunk in chunks]))
    return torch.cat(parts, dim=1)


def _keep_in_group(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Compute `keep_by_fixed_point` for a single group: float32 [B, n, 4] and bool [B, n]."""
    shared, areas = intersection(boxes, boxes), area(boxes)  # [B, n, n], [B, n]
    iou = shared / (areas[:, :, None] + areas[:, None] - shared)
    suppresses = (iou > threshold).triu_(diagonal=1)  # [B, better, worse]
    keep, before = valid, None
    while before is None or not torch.equal(keep, before):
        before = keep
        keep = valid & ~(suppresses & before[:, :, None]).any(dim=1)
    return keep


@functools.cache
def triton_agrees(device: torch.device) -> bool:
    """Return whether the Triton kernel works on a device and finds what `keep_by_fixed_point` finds."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand((2, 700, 2), generator=generator) * 100
    boxes = torch.cat((corners, corners + 5 + torch.rand((2, 700, 2), generator=generator) * 60), dim=2).to(device)
    valid = (torch.rand((2, 700), generator=generator) < 0.9).to(device)
    groups = ([700], [500, 150, 50])
    try:
        from trainer.step.triton_nms import keep_by_triton

        found = [keep_by_triton(boxes, valid, sizes, 0.7) for sizes in groups]
    except Exception as error:  # a compiler for GPUs may fail in any way, and there is another form
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("NMS runs without Triton, which fails on this GPU (%s)", reason)
        return False
    expected = [keep_by_fixed_point(boxes, valid, sizes, 0.7) for sizes in groups]
    agrees = all(torch.equal(*pair) for pair in zip(found, expected))
    if not agrees:
        log.warning("NMS runs without Triton, whose kernel does not agree with the reference on this GPU")
    return agrees
