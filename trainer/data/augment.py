"""Resizing and augmentation of an image together with its instances.

All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from shards.stream import batch_transport
from trainer.config.settings import DataConfig
from trainer.data.instances import Instances

STRIDE = 32  # of the coarsest feature map with weights: padded sizes are multiples of it, as in torchvision


def scaled_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Compute the size, (height, width), at which the network sees an image.

    The shorter side becomes `min_size`, unless the longer would then exceed `max_size`: in that case the longer becomes
    `max_size`. The rounding is torchvision's, so training and inference see an image at the same size. matterport's
    square mode differs: it never shrinks an image that fits into `max_size`.
    """
    factor = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, math.floor(height * factor)), max(1, math.floor(width * factor))


def resize(image: Tensor, instances: Instances, height: int, width: int) -> tuple[Tensor, Instances]:
    """Resize an image, uint8 [3, H, W], and its instances.

    Bilinear without antialiasing, as torchvision's transform resizes at inference: with antialiasing, training would
    see smoother images than inference.
    """
    resized = transforms.resize(image, [height, width], antialias=False)
    return resized, instances.scale(width / image.shape[-1], height / image.shape[-2])


@dataclass(frozen=True)
class View:
    """What the network sees of an image: a window of it, after scaling. All in pixels.

    Attributes:
        scaled: (height, width) of the whole image.
        top, left, height, width: the window.
    """

    scaled: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @staticmethod
    def whole(scaled: tuple[int, int]) -> View:
        """Return the view of all of an image that is scaled to (height, width)."""
        return View(scaled, 0, 0, *scaled)

    def of(self, image: Tensor, instances: Instances) -> tuple[Tensor, Instances]:
        """Return the view of an image, uint8 [3, H, W], and its instances; see `Instances.crop`."""
        image, instances = resize(image, instances, *self.scaled)
        image = image[:, self.top : self.top + self.height, self.left : self.left + self.width]
        return image, instances.crop(self.left, self.top, self.width, self.height)


def jittered(height: int, width: int, size: int, scales: Sequence[float], rng: np.random.Generator) -> View:
    """Draw a view of an image for large-scale jitter: a random window at a random scale.

    Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", CVPR 2021;
    torchvision's `ScaleJitter` and `FixedSizeCrop`. The factor is uniform in `scales`; at 1 the image just fits into
    the square of `size`. No side of the window exceeds `size`.
    """
    factor = min(size / height, size / width) * rng.uniform(scales[0], scales[1])
    scaled = max(1, int(height * factor)), max(1, int(width * factor))
    top, left = (int(rng.integers(0, max(side - size, 0) + 1)) for side in scaled)
    return View(scaled, top, left, min(scaled[0], size), min(scaled[1], size))


def photometric(image: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image, each with the given probability.

    Ranges and order are those of torchvision's `RandomPhotometricDistort` (Liu et al., "SSD", ECCV 2016), which cannot
    be seeded per sample. The image is uint8 [3, H, W] RGB.
    """
    changed = rng.random(4) < probability
    contrast_first = rng.random() < 0.5
    factors = rng.uniform((0.875, 0.5, 0.5, -0.05), (1.125, 1.5, 1.5, 0.05))
    adjustments = [
        transforms.adjust_brightness,
        transforms.adjust_contrast,
        transforms.adjust_saturation,
        transforms.adjust_hue,
    ]
    for i in (0, 1, 2, 3) if contrast_first else (0, 2, 3, 1):
        if changed[i]:
            image = adjustments[i](image, factors[i])
    return image


def flip(image: Tensor, instances: Instances) -> tuple[Tensor, Instances]:
    """Mirror an image, [3, H, W], and its instances left and right."""
    return image.flip(-1), instances.flip(image.shape[-1])


def padded_size(data: DataConfig, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size, (height, width), that a batch of images of these sizes is padded to."""
    height, width = map(max, zip(*sizes))
    if data.resize == "shortest":
        return round_up(height), round_up(width)
    # A batch of both orientations needs the square.
    candidates = [*repeated_sizes(data), (round_up(data.max_size),) * 2]
    return next(size for size in candidates if height <= size[0] and width <= size[1])


def repeated_sizes(data: DataConfig) -> list[tuple[int, int]]:
    """Return the sizes, (height, width), that most batches are padded to; none if there is no small number of them."""
    longer, shorter = round_up(data.max_size), round_up(max(data.min_sizes or [data.min_size]))
    return {
        "square": [(longer, longer)],
        "scale_jitter": [(longer, longer)],
        "oriented": [(shorter, longer), (longer, shorter)],
        "shortest": [],
    }[data.resize]


def round_up(side: int) -> int:
    """Round the side of a padded image up to a multiple of STRIDE."""
    return math.ceil(side / STRIDE) * STRIDE


def empty_images(count: int, height: int, width: int) -> Tensor:
    """Allocate the images of a batch, not initialised, for `pad_into` to fill.

    The result is uint8 [count, 3, H, W], with H and W multiples of STRIDE: a view of count x H x W x 3 memory, as
    images are decoded, so that rows are copied whole. In a loader process it is in the batch's shared memory.
    """
    height, width = (math.ceil(side / STRIDE) * STRIDE for side in (height, width))
    return batch_transport.empty((count, height, width, 3)).permute(0, 3, 1, 2)


def pad_into(image: Tensor, slot: Tensor) -> Tensor:
    """Copy an image, [3, h, w], to the top left of a slot, [3, H, W], zero the rest, and return the copy, a view.

    matterport centres an image in its square; torchvision, and so the network at inference, puts it at the top left.
    """
    height, width = image.shape[-2:]
    copy = slot[:, :height, :width]
    copy.copy_(image)
    slot[:, :height, width:] = 0
    slot[:, height:] = 0
    return copy
