"""RoIAlign with a quick backward pass, beside torchvision's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from trainer.model.roi_align import pool

SIZES = [(250, 320), (256, 300)]


def maps(levels: int = 4, images: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """FPN's maps of images of 256 x 320 pixels, which ask for a gradient."""
    generator = torch.Generator().manual_seed(1)
    return {
        str(level): torch.randn((images, 6, 64 >> level, 80 >> level), generator=generator).to(dtype).requires_grad_()
        for level in range(levels)
    }


def boxes_of(count: int, seed: int) -> Tensor:
    """From a fraction of a pixel to larger than the image, some of them outside of it."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand((count, 2), generator=generator) * torch.tensor([400.0, 330.0]) - 40
    size = torch.exp(torch.rand((count, 2), generator=generator) * 7 - 1)
    return torch.cat((corner, corner + size), dim=1)


def gradients(pooled: Tensor, features: dict[str, Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    wanted = torch.randn(pooled.shape, generator=generator).to(pooled.dtype)
    return list(torch.autograd.grad(pooled, list(features.values()), wanted, materialize_grads=True))


@given(
    counts=st.tuples(st.integers(0, 40), st.integers(0, 40)), seed=st.integers(0, 1000), side=st.sampled_from([7, 14])
)
def test_values_are_torchvisions_to_the_bit_and_gradients_up_to_the_order_of_sums(
    counts: tuple[int, int], seed: int, side: int
) -> None:
    pooler, features = MultiScaleRoIAlign(["0", "1", "2", "3"], side, 2), maps()
    boxes = [boxes_of(count, seed + number) for number, count in enumerate(counts)]
    wanted, found = pooler(features, boxes, SIZES), pool(pooler, features, boxes, SIZES)
    assert torch.equal(found, wanted)
    for ours, theirs in zip(gradients(found, features), gradients(wanted, features), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("samples", [1, 3])
def test_one_level_and_other_numbers_of_points(samples: int) -> None:
    pooler, features = MultiScaleRoIAlign(["0"], 5, samples), maps(levels=1)
    boxes = [boxes_of(30, 1), boxes_of(20, 2)]
    wanted, found = pooler(features, boxes, SIZES), pool(pooler, features, boxes, SIZES)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(gradients(found, features), gradients(wanted, features), rtol=1e-4, atol=1e-4)


def test_a_number_of_points_that_depends_on_the_box_is_left_to_torchvision() -> None:
    pooler, features = MultiScaleRoIAlign(["0", "1"], 7, 0), maps(levels=2)
    boxes = [boxes_of(30, 1), boxes_of(20, 2)]
    wanted, found = pooler(features, boxes, SIZES), pool(pooler, features, boxes, SIZES)
    assert torch.equal(found, wanted)
    assert all(map(torch.equal, gradients(found, features), gradients(wanted, features)))


def test_maps_in_bf16_as_autocast_gives_them() -> None:
    pooler, features = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2), maps(dtype=torch.bfloat16)
    boxes = [boxes_of(30, 1), boxes_of(20, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = pooler(features, boxes, SIZES), pool(pooler, features, boxes, SIZES)
    assert torch.equal(found, wanted)
    # bfloat16 keeps eight bits, and torchvision rounds to it what each level gets, as we do.
    torch.testing.assert_close(gradients(found, features), gradients(wanted, features), rtol=2e-2, atol=2e-2)


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    pooler, features = MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2), maps()
    boxes = [boxes_of(200, 1), boxes_of(150, 2)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(gradients(pool(pooler, features, boxes, SIZES), features))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
