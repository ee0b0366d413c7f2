"""How good detections are. A metric has three methods: `reset` forgets all images, `process` takes some in, `evaluate`
rates those of all ranks (every rank calls it, and the main one gets the result)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

# Joins every rank's list into one on the main rank; the others get None.
Gather = Callable[[list[Any]], list[Any] | None]


def alone(items: list[Any]) -> list[Any]:
    """The `Gather` of a single process."""
    return items


class OfImage(Protocol):
    """What a metric keeps of one image."""

    @property
    def image_id(self) -> str: ...


T = TypeVar("T", bound=OfImage)


def each_image_once(items: Iterable[T]) -> list[T]:
    """All ranks' images in the order of their ids, which is the same for any number of ranks.

    Raises:
        RuntimeError: an image was processed twice.
    """
    images = sorted(items, key=lambda item: item.image_id)
    twice = [image_id for image_id, count in Counter(image.image_id for image in images).items() if count > 1]
    if twice:
        raise RuntimeError(f"{len(twice)} images were processed more than once, such as {twice[0]}")
    return images
