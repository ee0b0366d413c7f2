"""Inference of Mask R-CNN: from images to detections with masks as RLE, in bounded memory.

The detections are those of torchvision's network. On CUDA, `detect_batches` queues the next batches before it encodes
the masks of one, so that the device computes while the host encodes and the caller evaluates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from shards.format.rle import Rle
from shards.format.sample import Instance
from trainer.model.detection import Boxes, choose_boxes, predict_masks, score_proposals
from trainer.model.paste import Paste

T = TypeVar("T")


class ImageBatch(Protocol):
    """A batch of RGB images of any sizes, [3, H, W] each, uint8 or float32 from 0 to 1."""

    @property
    def images(self) -> list[Tensor]:
        """The images."""


B = TypeVar("B", bound=ImageBatch)


@dataclass(frozen=True, slots=True)
class Detections:
    """The detections in one image, sorted by descending score.

    Attributes:
        boxes: float32 [N, 4] left, top, right, bottom in pixels of the original image.
        labels: int64 [N] category ids, from 1.
        scores: float32 [N], 0 to 1.
        masks: N masks at the image's size.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: tuple[Rle, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def instances(self) -> list[Instance]:
        """Convert the detections to annotations, for drawing and writing."""
        return [
            Instance(int(label), (float(x0), float(y0), float(x1 - x0), float(y1 - y0)), mask)
            for (x0, y0, x1, y1), label, mask in zip(self.boxes, self.labels, self.masks, strict=True)
        ]


def detect(network: MaskRCNN, images: Sequence[Tensor], device: torch.device | str) -> list[Detections]:
    """Run a network in evaluation mode on RGB images of any sizes, [3, H, W] each, uint8 or float32 from 0 to 1."""
    [found] = _detections(network, iter([images]), torch.device(device), ahead=0)
    return found


def detect_batches(
    network: MaskRCNN, batches: Iterable[B], device: torch.device
) -> Iterator[tuple[B, list[Detections]]]:
    """Yield each batch with its detections; on CUDA, after the work of the next three batches is queued."""
    taken = deque[B]()

    def images() -> Iterator[list[Tensor]]:
        for batch in batches:
            taken.append(batch)
            yield batch.images

    for found in _detections(network, images(), device, ahead=1 if device.type == "cuda" else 0):
        yield taken.popleft(), found


def _detections(
    network: MaskRCNN, batches: Iterator[Sequence[Tensor]], device: torch.device, *, ahead: int
) -> Iterator[list[Detections]]:
    """Yield the detections in batches of images.

    A stage waits for what the one before it computed for the same batch. With `ahead` = 1 the stage before has then
    queued the next batch too, so the device does not run out of work.
    """
    if network.training:
        raise RuntimeError("the network is in training mode: call eval() first")
    scored = delayed(map(partial(score_proposals, network, device), batches), ahead)
    found = delayed(map(partial(choose_boxes, network), scored), ahead)
    yield from map(_finish_masks, delayed(map(partial(_start_masks, network), found), ahead))


def delayed(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield each item after `count` further ones were taken."""
    waiting = deque[T]()
    for item in items:
        waiting.append(item)
        del item  # it belongs to the caller
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _start_masks(network: MaskRCNN, found: Boxes) -> tuple[list[Detections], Paste]:
    """Wait for the boxes of a batch, and queue their masks; the detections have none yet."""
    boxes, labels, scores = (copy.flatten(0, 1).numpy() for copy in found.on_host.wait())  # [B * D, 4], [B * D] twice
    [slots] = (scores >= 0).nonzero()  # [K]
    sizes, images = found.sizes, slots // found.boxes.shape[1]
    scale = sizes.original.astype(np.float32) / sizes.resized.astype(np.float32)  # as torchvision's `resize_boxes`
    boxes = boxes[slots] * scale[images][:, [1, 0, 1, 0]]
    ends = np.bincount(images, minlength=len(scale)).cumsum()[:-1]
    of_images = zip(np.split(boxes, ends), np.split(labels[slots], ends), np.split(scores[slots], ends), strict=True)
    masks = Paste(predict_masks(network, found, slots), boxes, sizes.original[images])
    return [Detections(*columns, ()) for columns in of_images], masks


def _finish_masks(started: tuple[list[Detections], Paste]) -> list[Detections]:
    """Wait for the masks of a batch, and encode them."""
    detections, masks = started
    encoded = iter(masks.encode())
    return [replace(of_image, masks=tuple(islice(encoded, len(of_image)))) for of_image in detections]
