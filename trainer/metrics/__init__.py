"""How good detections are. A metric has three methods: reset, process, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from shards.sample import Sample

if TYPE_CHECKING:
    from trainer.detect import Detections

# Joins every rank's list into one on the main rank; the others get None.
Gather = Callable[[list[Any]], list[Any] | None]


def alone(items: list[Any]) -> list[Any]:
    """The `Gather` of a single process."""
    return items


class Metric(Protocol):
    """Takes in the images of one rank, and rates those of all ranks."""

    def reset(self) -> None:
        """Forget every image."""

    def process(self, samples: Sequence[Sample], detections: Sequence[Detections]) -> None:
        """Take in images: what is annotated (image bytes are not needed) and what was found, in the same order."""

    def evaluate(self, gather: Gather = alone) -> Any:
        """The result over the images of all ranks, None but on the main one; every rank must call it."""
