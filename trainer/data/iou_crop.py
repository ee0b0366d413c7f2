"""Random crops around objects, as SSD trains on them: torchvision's `RandomIoUCrop`, with its numbers.

Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.instances import GROUP_OF, IGNORED, Instances

OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # least IoU of the window with an object; 1: the whole image
TRIALS = 40  # for one of them, before another is drawn
MIN_SCALE = 0.3  # of a side of the window, as a share of the image's
ASPECT_RATIOS = (0.5, 2.0)  # of the window's width to its height


class Window(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


def draw_window(height: int, width: int, boxes: NDArray[np.float64], rng: np.random.Generator) -> Window:
    """Draw a window that contains the centre of an object and has a random least IoU with it, or the whole image.

    `boxes` are x0, y0, x1, y1 of the objects, float64 [M, 4].
    """
    while len(boxes):
        overlap = OVERLAPS[rng.integers(0, len(OVERLAPS))]
        if overlap >= 1:
            break
        for _ in range(TRIALS):
            scale = MIN_SCALE + (1 - MIN_SCALE) * rng.random(2)
            wide, high = int(width * scale[0]), int(height * scale[1])
            if wide == 0 or high == 0 or not ASPECT_RATIOS[0] <= wide / high <= ASPECT_RATIOS[1]:
                continue
            place = rng.random(2)
            window = Window(int((width - wide) * place[0]), int((height - high) * place[1]), wide, high)
            inside = boxes[_has_centre(boxes, window)]
            if len(inside) and _overlaps(inside, window).max() >= overlap:
                return window
    return Window(0, 0, width, height)


def crop(image: Tensor, instances: Instances, window: Window) -> tuple[Tensor, Instances]:
    """Cut a window out of an image, [3, H, W], and clip its instances to it.

    SSD leaves out the objects whose centre is outside of the window. They become IGNORED here, because part of them is
    still visible, which must not be taught as background.
    """
    left, top, width, height = window
    outside = torch.from_numpy(~_has_centre(instances.boxes.numpy(), window)) & ((instances.flags & GROUP_OF) == 0)
    instances = replace(instances, flags=torch.where(outside, instances.flags | IGNORED, instances.flags))
    return image[:, top : top + height, left : left + width], instances.crop(left, top, width, height)


def _has_centre(boxes: NDArray[np.floating], window: Window) -> NDArray[np.bool_]:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    corner, size = np.array(window[:2]), np.array(window[2:])
    return np.asarray(((corner < centres) & (centres < corner + size)).all(axis=1))


def _overlaps(boxes: NDArray[np.float64], window: Window) -> NDArray[np.float64]:
    """Return the IoU of each box with the window."""
    corner, size = np.array(window[:2]), np.array(window[2:])
    shared = np.minimum(boxes[:, 2:], corner + size) - np.maximum(boxes[:, :2], corner)
    common = shared.clip(min=0).prod(axis=1)
    return np.asarray(common / ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + size.prod() - common))
