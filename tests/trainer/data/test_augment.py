"""Resizing and augmentation, against torchvision's own transform."""

import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from shards.format import rle
from shards.format.sample import Instance
from trainer.data import augment
from trainer.data.instances import read_instances


def picture(height: int, width: int) -> torch.Tensor:
    """A smooth picture with some noise, uint8 [3, H, W]."""
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(width) / 17)[None, :] * np.cos(np.arange(height) / 11)[:, None]
    values = 128 + 90 * waves[None] + rng.normal(0, 8, (3, height, width))
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("min_size", "max_size"), [(800, 1024), (192, 256), (160, 160)])
def test_scaled_size_is_torchvisions(min_size, max_size):
    rng = np.random.default_rng(0)
    transform = GeneralizedRCNNTransform(min_size, max_size, [0.0], [1.0]).eval()
    for height, width in [(1024, 683), (683, 1024), (1024, 1024), (5, 300), *rng.integers(40, 1025, (15, 2)).tolist()]:
        resized, _ = transform.resize(torch.zeros(1, height, width))
        assert augment.scaled_size(height, width, min_size, max_size) == tuple(resized.shape[-2:])


@pytest.mark.parametrize("shape", [(300, 400), (90, 120), (192, 256), (400, 150)])
def test_resize_gives_pixels_and_boxes_as_at_inference(shape):
    image = picture(*shape)
    transform = GeneralizedRCNNTransform(192, 256, [0.0] * 3, [1.0] * 3).eval()
    target = {"boxes": torch.tensor([[10.0, 20.0, 60.0, 60.0]])}
    expected, expected_target = transform.resize(image.float() / 255, target)
    instances = read_instances([Instance(1, (10.0, 20.0, 50.0, 40.0), None)])
    height, width = shape
    resized, scaled = augment.resize(image, instances, *augment.scaled_size(height, width, 192, 256))
    assert resized.dtype == torch.uint8
    assert (resized.float() - expected * 255).abs().max() <= 1.01  # the rounding to uint8
    assert torch.allclose(scaled.boxes, expected_target["boxes"], atol=1e-4)


def test_pad_into_copies_to_the_top_left_and_zeros_the_rest():
    images = [picture(50, 70), picture(64, 33)]
    slots = augment.empty_images(2, 64, 70)
    assert slots.shape == (2, 3, 64, 96)
    assert augment.empty_images(1, 100, 100).shape == (1, 3, 128, 128)
    slots[:] = 7  # memory is not clean
    for image, slot in zip(images, slots, strict=True):
        copy = augment.pad_into(image, slot)
        assert torch.equal(copy, image)
        copy += 1  # a view of the slot
    assert torch.equal(slots[0, :, :50, :70], images[0] + 1)
    assert slots[0, :, 50:].sum() + slots[0, :, :, 70:].sum() == 0


def test_jittered_fits_the_square_and_moves_boxes_with_pixels():
    # A white rectangle on black: its box must stay where the white pixels are.
    image, mask = torch.zeros((3, 90, 120), dtype=torch.uint8), np.zeros((90, 120), dtype=np.uint8)
    image[:, 30:60, 40:80], mask[30:60, 40:80] = 255, 1
    instances = read_instances([Instance(1, (40.0, 30.0, 40.0, 30.0), rle.encode(mask))])
    sizes = set()
    for seed in range(30):
        found, left = augment.jittered(90, 120, 64, (0.1, 2.0), np.random.default_rng(seed)).of(image, instances)
        height, width = found.shape[-2:]
        sizes.add((height, width))
        assert max(height, width) <= 64
        white = found[0] > 127
        if len(left) == 0:
            assert white.sum() <= max(height, width)
            continue
        rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert torch.allclose(left.boxes[0], torch.tensor([float(v) for v in box]), atol=1.0)
    assert len(sizes) > 15


def test_photometric_depends_on_probability_and_generator_only():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment.photometric(image, 0.0, np.random.default_rng(1)), image)
    first, same, other = (augment.photometric(image, 1.0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.uint8
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, image)
