"""Pasting masks: torchvision's result in bounded memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from shards.format import rle
from trainer.model import inference as detect
from trainer.model.inference import paste


def random_masks(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth blobs in boxes of all sizes, some beyond the image's border, some without an area."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand((count, 1, 5, 5), generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear")
    corners = torch.rand((count, 2, 2), generator=generator) * torch.tensor([width, height]) * 1.1 - 4
    boxes = torch.cat((corners.min(1).values, corners.max(1).values), dim=1)
    boxes[0, 2:] = boxes[0, :2]
    boxes[1] = torch.tensor([0.0, 0.0, width, height])
    return masks, boxes


@pytest.mark.parametrize("limit", [1, 3000, 2**30])
def test_masks_are_those_of_torchvision(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "PASTE_BYTES", limit)
    height, width = 61, 90
    masks, boxes = random_masks(40, height, width)
    expected = (paste_masks_in_image(masks, boxes, (height, width))[:, 0] >= 0.5).numpy()
    ours = paste(masks, boxes, height, width)
    assert expected.any(axis=(1, 2)).sum() > 30
    np.testing.assert_array_equal([rle.decode(mask) for mask in ours], expected)
    assert ours == [rle.encode(mask) for mask in expected]  # the very same bytes
    assert paste(masks[:0], boxes[:0], height, width) == []


def test_a_box_outside_the_image_is_an_empty_mask() -> None:
    masks, _ = random_masks(3, 50, 50)
    ours = paste(masks, torch.tensor([[60.0, 10, 80, 30], [-40, -40, -20, -20], [10, 70, 30, 90]]), 50, 50)
    assert [rle.area(mask) for mask in ours] == [0, 0, 0]


def test_many_detections_on_a_large_photograph_stay_in_bounds() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of the memory is read from Linux' /proc")
    height, width = 3000, 4000
    masks, boxes = random_masks(20, height, width)
    boxes[:] = torch.tensor([0.0, 0.0, width, height])  # the worst case: all over the image; at once they are 1 GB
    paste(masks[:1], boxes[:1], height, width)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    paste(masks, boxes, height, width)
    assert resident("VmHWM") - before < 2 * detect.PASTE_BYTES + 10 * height * width


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
