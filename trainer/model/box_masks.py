"""Masks of objects whose boxes and classes are known, from a network's mask head, in bounded memory.

No proposal and no detection is involved: the RoIs are the boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from shards.format import rle
from shards.format.rle import Rle
from trainer.model.detection import masks_of_rois, network_input, sizes_of
from trainer.model.inference import delayed
from trainer.model.paste import MASK_THRESHOLD, Paste
from trainer.step.host_copy import HostCopy, to_device
from trainer.step.roi_align import Rois

ROIS_AT_ONCE = 256  # in the mask head, whichever image of a batch they belong to
TOLERANCE = 1e-3  # pixels, to which the coordinates of boxes are rounded


class BoxedImage(Protocol):
    """An image with the boxes of some objects."""

    @property
    def pixels(self) -> Tensor:
        """RGB, uint8 [3, H, W]."""

    @property
    def boxes(self) -> NDArray[np.float32]:
        """float32 [N, 4] left, top, right, bottom in pixels of the image."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [N] category ids of the network."""


class BoxedImages(Protocol):
    """A batch of such images."""

    @property
    def items(self) -> Sequence[BoxedImage]:
        """The images."""


B = TypeVar("B", bound=BoxedImages)


class BoxMask(NamedTuple):
    """An object's mask, inside its box, at the image's size, and its mean probability; None and 0 if it is empty."""

    mask: Rle | None
    score: float


class _Started(NamedTuple):
    """Masks of a batch that are being computed: how many each image has, their scores, and the masks."""

    counts: list[int]
    scores: HostCopy
    masks: Paste


def mask_batches(
    network: MaskRCNN, batches: Iterable[B], device: torch.device, margin: float = 0.0
) -> Iterator[tuple[B, list[list[BoxMask]]]]:
    """Yield each batch with the masks of each image's boxes; on CUDA, after the work of the next one is queued.

    A mask is what torchvision's network pastes for a detection with this box, extended by the margin, and this class,
    cut off at the pixels that the box touches.

    Args:
        network: in evaluation mode on the device.
        batches: images with their boxes.
        device: of the network.
        margin: on each side of the RoI of a box, as a share of its width and height.
    """
    started = ((batch, _start(network, device, batch.items, margin)) for batch in batches)
    for batch, masks in delayed(started, 1 if device.type == "cuda" else 0):
        yield batch, _finish(masks)


@torch.no_grad()
def _start(network: MaskRCNN, device: torch.device, items: Sequence[BoxedImage], margin: float) -> _Started:
    images = [item.pixels for item in items]
    sizes = sizes_of(network, images)
    maps = list(network.backbone(network_input(network, images, sizes, device)).values())
    maps = maps[: len(network.roi_heads.mask_roi_pool.featmap_names)]
    boxes = np.concatenate([item.boxes for item in items])  # [K, 4]
    sides = boxes[:, 2:] - boxes[:, :2]
    wide = boxes + np.float32(margin) * np.concatenate((-sides, sides), axis=1)
    counts = [len(item.boxes) for item in items]
    numbers = np.repeat(np.arange(len(items)), counts)  # [K], the image of each box
    scale = sizes.resized.astype(np.float32) / sizes.original.astype(np.float32)  # as torchvision's `resize_boxes`
    rois = Rois(to_device(wide * scale[numbers][:, [1, 0, 1, 0]], device), to_device(numbers, device))
    labels = to_device(np.concatenate([item.labels for item in items]), device)
    parts = [slice(first, first + ROIS_AT_ONCE) for first in range(0, len(boxes), ROIS_AT_ONCE)]
    of_rois = partial(masks_of_rois, network, maps)
    masks = torch.cat([of_rois(Rois(rois.boxes[part], rois.images[part]), labels[part]) for part in parts])
    of_boxes = sizes.original[numbers]
    return _Started(counts, HostCopy(_scores(masks)), Paste(masks, wide, of_boxes, _windows(boxes, of_boxes)))


def _finish(started: _Started) -> list[list[BoxMask]]:
    masks = started.masks.encode()
    [scores] = started.scores.wait()
    found = (
        BoxMask(mask, round(score, 4)) if rle.area(mask) else BoxMask(None, 0.0)
        for mask, score in zip(masks, scores.tolist(), strict=True)
    )
    return [list(islice(found, count)) for count in started.counts]


def _scores(masks: Tensor) -> Tensor:
    """Return the mean probability of the cells that are in each mask, float32 [K], of probabilities [K, M, M]."""
    is_in = masks >= MASK_THRESHOLD
    return (masks * is_in).sum(dim=(1, 2)) / is_in.sum(dim=(1, 2)).clamp(min=1)


def _windows(boxes: NDArray[np.float32], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pixels that boxes touch, int64 [K, 4] left, top, right, bottom (exclusive), of images of `sizes`."""
    start = np.floor(boxes[:, :2] + TOLERANCE).clip(min=0)
    end = np.minimum(np.ceil(boxes[:, 2:] - TOLERANCE), sizes[:, ::-1])
    return np.concatenate((start, end), axis=1).astype(np.int64)
