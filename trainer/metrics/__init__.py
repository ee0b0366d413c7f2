"""How good detections are. A metric has three methods: `reset` forgets all images, `process` takes some in, `evaluate`
rates those of all ranks (every rank calls it, and the main one gets the result)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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


def images_of_all_ranks(own: list[T], gather: Gather) -> list[T] | None:
    """Every rank's images in the order of their ids, which is the same for any number of ranks.

    Args:
        own: what this rank has processed.
        gather: see `Gather`.

    Returns:
        None on ranks that `gather` gives nothing.

    Raises:
        RuntimeError: an image was processed twice.
    """
    gathered: list[T] | None = gather(own)
    if gathered is None:
        return None
    images = sorted(gathered, key=lambda item: item.image_id)
    twice = [image_id for image_id, count in Counter(image.image_id for image in images).items() if count > 1]
    if twice:
        raise RuntimeError(f"{len(twice)} images were processed more than once, such as {twice[0]}")
    return images
