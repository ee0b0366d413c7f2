"""Non-maximum suppression that returns a mask: torchvision's operator, the fixed point and the Triton kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import nms

from tests.trainer import tiny
from trainer.step.nms import keep_by_fixed_point, nms_keep


def drawn(seed: int, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of two images, some of them equal or empty, scores that descend in each group, and which are valid."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    corners = (torch.rand((2, count, 2), generator=generator) * 40).round()
    boxes = torch.cat((corners, corners + (torch.rand((2, count, 2), generator=generator) * 30).round()), dim=2)
    scores = [torch.rand((2, size), generator=generator).sort(dim=1, descending=True).values for size in sizes]
    return boxes, torch.cat(scores, dim=1), torch.rand((2, count), generator=generator) < 0.9


@settings(max_examples=50)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.sampled_from([0.25, 0.5, 0.75]),
)
def test_fixed_point_equals_torchvision(seed: int, sizes: list[int], threshold: float) -> None:
    boxes, scores, valid = drawn(seed, sizes)
    found = keep_by_fixed_point(boxes, valid, sizes, threshold)
    assert torch.equal(found, nms_keep(boxes, scores, valid, sizes, threshold))
    first = sizes[0]
    index = torch.where(valid[0, :first])[0]
    kept = index[nms(boxes[0, index], scores[0, index], threshold)]
    assert torch.where(found[0, :first])[0].tolist() == sorted(kept.tolist())


def test_nms_keep_is_an_operation_that_torch_can_compile() -> None:
    boxes, scores, valid = drawn(0, [20, 10])
    torch.library.opcheck(nms_keep, (boxes, scores, valid, [20, 10], 0.5))


INTERPRETED = """
import torch
from tests.trainer.step.test_nms import drawn
from trainer.step.nms import keep_by_fixed_point
from trainer.step.triton_nms import keep_by_triton
for seed, sizes in enumerate(([50], [130, 40, 7], [33, 32], [300])):
    boxes, scores, valid = drawn(seed, sizes)
    threshold = 0.7 if seed % 2 else 0.3
    found = keep_by_triton(boxes, valid, sizes, threshold)
    assert torch.equal(found, keep_by_fixed_point(boxes, valid, sizes, threshold))
"""


@pytest.mark.slow
def test_the_triton_kernel_equals_the_fixed_point_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="torch has no Triton on this platform")
    environment = tiny.environment(TRITON_INTERPRET="1")
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
