"""Inference in batches of images that have one shape for the network, with the results in the order of the images.

Nothing is padded for the sake of another image, so detections do not depend on what else is in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from trainer.model.detection import padded_size, sizes_of
from trainer.model.inference import Detections, detect_batches

# An image waits for others of its shape until this many batches, or bytes of pixels, have come after it.
MOST_BATCHES = 4
MOST_BYTES = 256 * 2**20


class Image(Protocol):
    """What detections are wanted for."""

    @property
    def pixels(self) -> Tensor:
        """RGB, uint8 [3, H, W]."""


T = TypeVar("T", bound=Image)
R = TypeVar("R")  # the result for an image


@dataclass
class LikeBatch(Generic[T]):
    """Images of one shape, with their numbers in the order of all images."""

    bytes_before: int  # the pixels of all images before the first one
    numbers: list[int] = field(default_factory=list)
    items: list[T] = field(default_factory=list)

    @property
    def images(self) -> list[Tensor]:
        """The pixels."""
        return [item.pixels for item in self.items]


def detect_in_order(
    network: MaskRCNN, items: Iterable[T], device: torch.device, batch_size: int
) -> Iterator[tuple[T, Detections]]:
    """Yield each image with its detections, in the given order; `network` is in evaluation mode on the device."""
    return in_order(detect_batches(network, like_batches(network, items, batch_size), device))


def in_order(batches: Iterable[tuple[LikeBatch[T], Sequence[R]]]) -> Iterator[tuple[T, R]]:
    """Yield each image with its result, in the order of all images, from batches with the results of their images."""
    done: dict[int, tuple[T, R]] = {}
    due = 0
    for batch, found in batches:
        done.update(zip(batch.numbers, zip(batch.items, found, strict=True), strict=True))
        while due in done:
            yield done.pop(due)
            due += 1


def like_batches(network: MaskRCNN, items: Iterable[T], batch_size: int) -> Iterator[LikeBatch[T]]:
    """Group images to batches of one shape, in bounded memory; a rare shape makes smaller batches."""
    groups: dict[tuple[int, int], LikeBatch[T]] = {}  # by shape, the one with the earliest image first
    nbytes = 0
    for number, item in enumerate(items):
        shape = padded_size(network, sizes_of(network, [item.pixels]))
        group = groups.setdefault(shape, LikeBatch(nbytes))
        group.numbers.append(number)
        group.items.append(item)
        nbytes += item.pixels.nbytes
        if len(group.items) == batch_size:
            yield groups.pop(shape)
        while groups and _is_late(next(iter(groups.values())), number, nbytes, batch_size):
            yield groups.pop(next(iter(groups)))
    yield from groups.values()


def _is_late(group: LikeBatch[T], number: int, nbytes: int, batch_size: int) -> bool:
    return number - group.numbers[0] >= MOST_BATCHES * batch_size or nbytes - group.bytes_before > MOST_BYTES
