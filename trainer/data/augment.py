"""What happens to an image and its instances between decoding and the batch: geometry and colour.

What is left to chance is drawn from the generator that is passed in.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from shards.stream import batch_transport as handover
from trainer.data import instances as geometry
from trainer.data.instances import Instances

STRIDE = 32  # of the coarsest feature map with weights: padded sizes are multiples of it, as in torchvision


def scaled_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """The size at which the network sees an image: the shorter side becomes `min_size`, unless the longer would exceed
    `max_size`, which it then becomes.

    The numbers are those of torchvision's transform, rounding included, so that training and inference see an image at
    the same size. matterport's square mode differs in that it never shrinks an image that fits into `max_size`.
    """
    factor = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, math.floor(height * factor)), max(1, math.floor(width * factor))


def resize(image: Tensor, instances: Instances, min_size: int, max_size: int) -> tuple[Tensor, Instances]:
    """Scale an image and its instances to `scaled_size`.

    Bilinear without antialiasing, because torchvision's transform resizes so at inference: a smoother training image
    would be another distribution.

    Args:
        image: uint8 [3, H, W].
        instances: in its pixels.
        min_size, max_size: see `scaled_size`.

    Returns:
        uint8 [3, h, w] and the instances in its pixels.
    """
    height, width = image.shape[-2:]
    return _resize_to(image, instances, *scaled_size(height, width, min_size, max_size))


def _resize_to(image: Tensor, instances: Instances, height: int, width: int) -> tuple[Tensor, Instances]:
    resized = transforms.resize(image, [height, width], antialias=False)
    return resized, geometry.scale(instances, width / image.shape[-1], height / image.shape[-2])


def scale_jitter(
    image: Tensor, instances: Instances, size: int, scales: tuple[float, float], rng: np.random.Generator
) -> tuple[Tensor, Instances]:
    """Large-scale jitter (Ghiasi et al., "Simple Copy-Paste", 2021; torchvision's `ScaleJitter` and `FixedSizeCrop`).

    The image is scaled by a factor times what would fit it into the square, and of what then stands out of the square
    a window is cut by chance.

    Args:
        image: uint8 [3, H, W].
        instances: in its pixels.
        size: side of the square.
        scales: the factor's range, evenly distributed.
        rng: draws the factor, and the window.

    Returns:
        uint8 [3, h, w], no side over `size`, and the instances in its pixels; boxes of which less than a pixel is left
        are dropped.
    """
    height, width = image.shape[-2:]
    factor = min(size / height, size / width) * rng.uniform(*scales)
    image, instances = _resize_to(image, instances, max(1, int(height * factor)), max(1, int(width * factor)))
    height, width = image.shape[-2:]
    top, left = (int(rng.integers(0, max(side - size, 0) + 1)) for side in (height, width))
    image = image[:, top : top + size, left : left + size]
    return image, geometry.crop(instances, left, top, image.shape[-1], image.shape[-2])


def photometric(image: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each changed with the given probability: the ranges and the order of
    torchvision's `RandomPhotometricDistort` (Liu et al., "SSD", 2016), whose random numbers are not ours to seed.

    Args:
        image: uint8 [3, H, W] RGB.
    """
    brightness, contrast, saturation, hue = rng.random(4) < probability
    contrast_first = rng.random() < 0.5
    factors = rng.uniform((0.875, 0.5, 0.5, -0.05), (1.125, 1.5, 1.5, 0.05))
    if brightness:
        image = transforms.adjust_brightness(image, factors[0])
    if contrast and contrast_first:
        image = transforms.adjust_contrast(image, factors[1])
    if saturation:
        image = transforms.adjust_saturation(image, factors[2])
    if hue:
        image = transforms.adjust_hue(image, factors[3])
    if contrast and not contrast_first:
        image = transforms.adjust_contrast(image, factors[1])
    return image


def flip(image: Tensor, instances: Instances) -> tuple[Tensor, Instances]:
    """Mirror an image, [3, H, W], and its instances left and right."""
    return image.flip(-1), geometry.flip(instances, image.shape[-1])


def clip(image: Tensor, instances: Instances) -> Instances:
    """The instances inside the image; boxes of which less than a pixel is left are dropped."""
    height, width = image.shape[-2:]
    return geometry.crop(instances, 0, 0, width, height)


def blank(count: int, height: int, width: int) -> Tensor:
    """Room for the images of a batch, for `place` to fill.

    Args:
        count: images.
        height, width: of the largest; rounded up to multiples of STRIDE.

    Returns:
        uint8 [count, 3, H, W], not initialised; a view of count x H x W x 3 memory, as images are decoded, so that rows
        are copied whole. In a loader process it lies where the batch is handed over.
    """
    height, width = (math.ceil(side / STRIDE) * STRIDE for side in (height, width))
    return handover.empty((count, height, width, 3)).permute(0, 3, 1, 2)


def place(image: Tensor, room: Tensor) -> Tensor:
    """Put an image, [3, h, w], into one of `blank`, [3, H, W], at the top left, zeros elsewhere; returns it there.

    matterport centres an image in its square; torchvision, and so a network at inference, has it at the top left.
    """
    height, width = image.shape[-2:]
    there = room[:, :height, :width]
    there.copy_(image)
    room[:, :height, width:] = 0
    room[:, height:] = 0
    return there
