"""Non-maximum suppression as two Triton kernels without a host read; see `trainer.step.nms`.

The first kernel compares all boxes of a group and writes one bit per pair, 32 better boxes to a word. The second, one
program per group, repeats the rounds of `keep_by_fixed_point` until one changes nothing.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source: annotations other than `tl.constexpr` are not types to it.

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.step.boxes import area

WORD = 32  # bits
COLUMNS = 128  # boxes per program of the first kernel


@triton.jit
def _compare(boxes, areas, bits, count, words, threshold, WORD: tl.constexpr, COLUMNS: tl.constexpr):
    """Write for each box, and each word of better boxes, which of these overlap it."""
    group, word, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    better = word * WORD + tl.arange(0, WORD)
    worse = block * COLUMNS + tl.arange(0, COLUMNS)
    of_better, of_worse = group * count + better, group * count + worse
    there, here = better < count, worse < count
    x0 = tl.load(boxes + of_better * 4, there, 0.0)[:, None]
    y0 = tl.load(boxes + of_better * 4 + 1, there, 0.0)[:, None]
    x1 = tl.load(boxes + of_better * 4 + 2, there, 0.0)[:, None]
    y1 = tl.load(boxes + of_better * 4 + 3, there, 0.0)[:, None]
    u0 = tl.load(boxes + of_worse * 4, here, 0.0)[None, :]
    v0 = tl.load(boxes + of_worse * 4 + 1, here, 0.0)[None, :]
    u1 = tl.load(boxes + of_worse * 4 + 2, here, 0.0)[None, :]
    v1 = tl.load(boxes + of_worse * 4 + 3, here, 0.0)[None, :]
    width = tl.maximum(tl.minimum(x1, u1) - tl.maximum(x0, u0), 0.0)
    height = tl.maximum(tl.minimum(y1, v1) - tl.maximum(y0, v0), 0.0)
    shared = width * height  # [WORD, COLUMNS]
    union = tl.load(areas + of_better, there, 1.0)[:, None] + tl.load(areas + of_worse, here, 1.0)[None, :] - shared
    over = (tl.div_rn(shared, union) > threshold) & (better[:, None] < worse[None, :]) & there[:, None]
    packed = tl.sum(over.to(tl.int32) << tl.arange(0, WORD)[:, None], axis=0)  # [COLUMNS]
    tl.store(bits + (group * words + word) * count + worse, packed, here)


@triton.jit
def _settle(bits, valid, keep, kept, count, words, WORD: tl.constexpr, BOXES: tl.constexpr, WORDS: tl.constexpr):
    """Repeat the rounds of one group until nothing changes; `kept` is its scratch for one word per 32 boxes."""
    group = tl.program_id(0)
    box, word = tl.arange(0, BOXES), tl.arange(0, WORDS)
    there = tl.load(valid + group * count + box, box < count, 0).to(tl.int32)
    current = there
    changed = 1
    while changed > 0:
        packed = tl.sum(tl.reshape(current, (WORDS, WORD)) << tl.arange(0, WORD)[None, :], axis=1)  # [WORDS]
        tl.store(kept + group * WORDS + word, packed)
        tl.debug_barrier()
        overlapped = tl.zeros((BOXES,), tl.int32)
        for number in range(words):
            better = tl.load(kept + group * WORDS + number)
            overlapped |= tl.load(bits + (group * words + number) * count + box, box < count, 0) & better
        following = tl.where(overlapped == 0, there, 0)
        changed = tl.sum((following != current).to(tl.int32), axis=0)
        current = following
        tl.debug_barrier()
    tl.store(keep + group * count + box, current.to(tl.int8), box < count)


def keep_by_triton(boxes: Tensor, valid: Tensor, sizes, threshold: float) -> Tensor:
    """Compute `trainer.step.nms.nms_keep`, whose arguments these are."""
    images, count = len(boxes), max(sizes)
    words, padded = triton.cdiv(count, WORD), max(triton.next_power_of_2(count), WORD)
    # Every group padded to the largest: [B, groups, count, 4].
    own = boxes.new_zeros((images, len(sizes), count, 4))
    there = torch.zeros((images, len(sizes), count), dtype=torch.int8, device=boxes.device)
    for number, (part, is_valid) in enumerate(zip(boxes.split(list(sizes), 1), valid.split(list(sizes), 1))):
        own[:, number, : part.shape[1]] = part
        there[:, number, : part.shape[1]] = is_valid
    groups = images * len(sizes)
    bits = torch.empty((groups, words, count), dtype=torch.int32, device=boxes.device)
    kept = torch.empty((groups, padded // WORD), dtype=torch.int32, device=boxes.device)
    keep = torch.empty_like(there)
    # Without fused multiply-add, so that each IoU is that of torch to the bit.
    _compare[groups, words, triton.cdiv(count, COLUMNS)](
        own, area(own), bits, count, words, threshold, WORD, COLUMNS, enable_fp_fusion=False
    )
    _settle[(groups,)](bits, there, keep, kept, count, words, WORD, padded, padded // WORD, num_warps=8)
    return torch.cat([keep[:, number, :size] for number, size in enumerate(sizes)], dim=1).bool()
