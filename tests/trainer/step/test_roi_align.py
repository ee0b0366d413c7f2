"""Both forms of RoIAlign, against torchvision's own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from trainer.step.roi_align import Rois, pool_in_fixed_shapes, pool_on_cpu

SIZES = [(250, 320), (256, 300)]
ALL_LEVELS = ["0", "1", "2", "3"]


def maps(levels: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Maps of an FPN for two images of 256 x 320 pixels, which require a gradient."""
    generator = torch.Generator().manual_seed(1)
    return {
        str(level): torch.randn((2, 6, 64 >> level, 80 >> level), generator=generator).to(dtype).requires_grad_()
        for level in range(levels)
    }


def boxes_of(count: int, seed: int) -> Tensor:
    """Boxes from a fraction of a pixel to larger than the image, some of them outside of it."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand((count, 2), generator=generator) * torch.tensor([400.0, 330.0]) - 40
    size = torch.exp(torch.rand((count, 2), generator=generator) * 7 - 1)
    return torch.cat((corner, corner + size), dim=1)


def gradients(pooled: Tensor, features: dict[str, Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(pooled.shape, generator=generator).to(pooled.dtype)
    return list(torch.autograd.grad(pooled, list(features.values()), upstream, materialize_grads=True))


def assert_agrees(
    pooler: MultiScaleRoIAlign, features: dict[str, Tensor], counts: tuple[int, int], seed: int, tolerance: float
) -> None:
    """Values to the bit, gradients up to a tolerance."""
    boxes = [boxes_of(count, seed + number) for number, count in enumerate(counts)]
    rois = Rois(torch.cat(boxes), torch.tensor([0, 1]).repeat_interleave(torch.tensor(counts)))
    expected = pooler(features, boxes, SIZES)
    expected_gradients = gradients(expected, features)
    for pool in (pool_on_cpu, pool_in_fixed_shapes):
        found = pool(pooler, list(features.values()), rois)
        assert torch.equal(found, expected)
        torch.testing.assert_close(gradients(found, features), expected_gradients, rtol=tolerance, atol=tolerance)


@settings(max_examples=40)
@given(
    counts=st.tuples(st.integers(0, 40), st.integers(0, 40)), seed=st.integers(0, 1000), side=st.sampled_from([7, 14])
)
def test_pool_equals_torchvision_to_the_bit_and_its_gradient_up_to_the_order_of_sums(
    counts: tuple[int, int], seed: int, side: int
) -> None:
    assert_agrees(MultiScaleRoIAlign(ALL_LEVELS, side, 2), maps(), counts, seed, tolerance=1e-4)


def test_pool_of_bfloat16_maps_under_autocast() -> None:
    # bfloat16 has eight significant bits, and both round the gradient of each level to it.
    with torch.autocast("cpu", torch.bfloat16):
        assert_agrees(MultiScaleRoIAlign(ALL_LEVELS, 7, 2), maps(dtype=torch.bfloat16), (30, 20), 1, tolerance=2e-2)


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    pooler, features = MultiScaleRoIAlign(ALL_LEVELS, 14, 2), maps()
    pooler(features, [boxes_of(1, 1), boxes_of(1, 2)], SIZES)  # learns the maps' scales
    rois = Rois(torch.cat([boxes_of(200, 1), boxes_of(150, 2)]), torch.arange(350) // 200)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(gradients(pool_on_cpu(pooler, list(features.values()), rois), features))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
