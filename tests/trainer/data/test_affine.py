"""Rotation, shear and shift, against torchvision's affine transform of full-size images and masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import ResNet50_Weights
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from shards.format import rle
from shards.format.sample import Instance
from trainer.config.settings import DataConfig
from trainer.data.affine import OUTSIDE, matrix_of, random_turn, shift, warp, warp_instances
from trainer.data.augment import View
from trainer.data.instances import Instances, read_instances
from trainer.data.mask_bitmaps import BITMAP, sample_targets

HEIGHT, WIDTH = 240, 320
Y, X = np.mgrid[:HEIGHT, :WIDTH]
SHAPES = [
    ((X - 160) / 70) ** 2 + ((Y - 120) / 40) ** 2 <= 1,
    ((X - 40) / 30) ** 2 + ((Y - 60) / 60) ** 2 <= 1,  # cut by the border
    (X > 230) & (X < 300) & (Y > 150) & (Y < 220) & ((X < 250) | (Y > 200)),  # an L
    (X > 90) & (X < 250) & (Y > 20) & (Y < 24),  # a pole
    ((X - 80) ** 2 + (Y - 190) ** 2 <= 30**2) & ((X - 80) ** 2 + (Y - 190) ** 2 >= 20**2),  # a ring
]
MASKS = torch.from_numpy(np.stack(SHAPES).astype(np.uint8))


def objects() -> Instances:
    encoded = [rle.encode(mask) for mask in MASKS.numpy()]
    return read_instances([Instance(1 + i, rle.bounds(mask), mask) for i, mask in enumerate(encoded)])


def boxed(box: tuple[float, float, float, float], *, is_group_of: bool = False) -> Instances:
    return read_instances([Instance(1, box, None, is_group_of=is_group_of)])


def by_torchvision(pixels: torch.Tensor, view: View, turn: dict[str, Any], fill: Sequence[float]) -> torch.Tensor:
    scaled = transforms.resize(pixels.float(), list(view.scaled), antialias=False)
    moved = transforms.affine(scaled, **turn, fill=list(fill), interpolation=InterpolationMode.BILINEAR)
    return moved[:, view.top : view.top + view.height, view.left : view.left + view.width]


@pytest.mark.parametrize(
    ("rotate", "shear", "translate", "view"),
    [
        (0, 0, 0, View.whole((HEIGHT, WIDTH))),
        (20, 0, 0, View.whole((HEIGHT, WIDTH))),
        (180, 0, 0, View.whole((HEIGHT, WIDTH))),
        (0, 30, 0, View.whole((HEIGHT, WIDTH))),
        (0, 0, 0.3, View.whole((HEIGHT, WIDTH))),
        (45, 10, 0.1, View.whole((150, 200))),
        (45, 10, 0.1, View((360, 480), 50, 60, 256, 256)),
    ],
)
def test_warp_agrees_with_full_size_masks(rotate: float, shear: float, translate: float, view: View) -> None:
    image = transforms.gaussian_blur(MASKS.amax(0).expand(3, -1, -1) * 200, [9, 9])
    data = DataConfig(rotate=rotate, shear=shear, translate=translate)
    for seed in range(3):
        matrix = random_turn(data, view.height, view.width, np.random.default_rng(seed))
        pixels, found = warp(image, objects(), matrix @ matrix_of(view, HEIGHT, WIDTH), view.height, view.width)

        draws = np.random.default_rng(seed).uniform(-1, 1, 4) * (rotate, shear, translate, translate)
        turn = {
            "angle": draws[0],
            "translate": [draws[2] * view.width, draws[3] * view.height],
            "scale": 1.0,
            "shear": [draws[1], 0.0],
            "center": [view.left + view.width / 2, view.top + view.height / 2],
        }

        # Two resamplings compared with one, and soft edges of the image.
        assert (pixels.float() - by_torchvision(image, view, turn, OUTSIDE)).abs().mean() < 1
        masks = (by_torchvision(MASKS * 255, view, turn, [0.0]) > 127).byte()
        # What is left of an object at the border may be so thin that half a pixel decides about its length.
        scale = view.scaled[0] / HEIGHT * view.scaled[1] / WIDTH
        present = (masks.sum((1, 2)) > 0.3 * scale * MASKS.sum((1, 2))).nonzero()[:, 0].tolist()
        rows = [found.labels.tolist().index(1 + i) for i in present]
        boxes = masks_to_boxes(masks[present]) + torch.tensor([0, 0, 1, 1])
        cells = (found.frames[rows, 2:] - found.frames[rows, :2]).amax(1, keepdim=True) / BITMAP
        assert ((found.boxes[rows] - boxes).abs() <= 0.5 + cells).all()
        expected = project_masks_on_boxes(masks[present].float(), boxes, torch.arange(len(rows)), 28) > 0.5
        targets = sample_targets(found.bitmaps[rows], found.frames[rows], torch.arange(len(rows)), boxes, 28) > 0.5
        union = (targets | expected).sum((1, 2))
        assert ((targets & expected).sum((1, 2)) / union).mean() > 0.93


def test_what_comes_in_from_outside_is_the_networks_mean_colour() -> None:
    image = torch.zeros((3, 40, 60), dtype=torch.uint8)
    pixels, _ = warp(image, read_instances([]), shift(30, 0), 40, 60)
    mean = torch.tensor(ResNet50_Weights.DEFAULT.transforms().mean)
    assert (pixels[:, :, :30] / 255 - mean[:, None, None]).abs().max() < 0.5 / 255 + 1e-4
    assert not pixels[:, :, 30:].any()


def turned(instances: Instances, degrees: float) -> Instances:
    rng = np.random.default_rng(0)
    data = DataConfig(rotate=degrees / rng.uniform(-1, 1))
    return warp_instances(instances, random_turn(data, 200, 200, np.random.default_rng(0)), 200, 200)


def test_a_box_without_a_mask_becomes_that_of_its_ellipse_and_a_region_that_of_its_corners() -> None:
    box = (60.0, 80.0, 80.0, 40.0)
    assert torch.allclose(turned(boxed(box), 90).boxes, torch.tensor([[80.0, 60, 120, 140]]), atol=1e-3)
    across = 2**0.5 / 2 * (40**2 + 20**2) ** 0.5
    ellipse = torch.tensor([[100 - across, 100 - across, 100 + across, 100 + across]])
    assert torch.allclose(turned(boxed(box), 45).boxes, ellipse, atol=1e-3)
    corners = 2**0.5 / 2 * 60
    outer = torch.tensor([[100 - corners, 100 - corners, 100 + corners, 100 + corners]])
    assert torch.allclose(turned(boxed(box, is_group_of=True), 45).boxes, outer, atol=1e-3)


def test_objects_that_leave_the_image_are_dropped() -> None:
    corner = np.zeros((200, 200), np.uint8)
    corner[:20, :20] = 1
    mask = rle.encode(corner)
    leaving = read_instances([Instance(1, rle.bounds(mask), mask), Instance(2, (0.0, 0.0, 20.0, 20.0), None)])
    assert len(turned(leaving, 45)) == len(turned(read_instances([]), 45)) == 0
