"""A sample as a small picture with its annotations."""

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.drawing.overlay import draw_instances
from shards.format import rle
from shards.format.dataset import Category
from shards.format.image import STORED, pillow_errors, rgb
from shards.format.sample import Sample


def draw_thumbnail(sample: Sample, size: tuple[int, int], categories: Sequence[Category]) -> Image.Image:
    """Draw a sample at `size`, (width, height); ImageError if its image is damaged."""
    picture = decode_at_least(sample.image, size).resize(size, Image.Resampling.LANCZOS)
    factors = (size[0] / sample.width, size[1] / sample.height) * 2
    instances = []
    for instance in sample.instances:
        x, y, w, h = (value * factor for value, factor in zip(instance.bbox, factors, strict=True))
        mask = instance.segmentation and rle.encode(small_mask(instance.segmentation, size))
        instances.append(replace(instance, bbox=(x, y, w, h), segmentation=mask))
    return draw_instances(picture, instances, categories)


def decode_at_least(image: bytes, size: tuple[int, int]) -> Image.Image:
    """Decode an image to RGB, a large JPEG at a fraction of its size, at least `size`; ImageError if it is damaged."""
    with pillow_errors(), Image.open(io.BytesIO(image), formats=STORED) as opened:
        opened.draft("RGB", size)
        return Image.fromarray(rgb(opened))


def small_mask(mask: rle.Rle, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Resize a mask to `size`, (width, height), as bool [H, W]; a mask that is not empty keeps at least one pixel."""
    full = Image.fromarray(rle.decode(mask) * np.uint8(255))
    pixels = np.asarray(full.resize(size, Image.Resampling.BOX))
    return pixels >= (128 if (pixels >= 128).any() else max(int(pixels.max()), 1))
