"""What the metrics that keep a record per image have in common."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from shards.format.dataset import Category
from trainer.metrics.overlaps import EvaluatedImage

# Joins the lists of all ranks on the main rank, and returns None on the others.
Gather = Callable[[list[Any]], list[Any] | None]


def single_process(items: list[Any]) -> list[Any]:
    """Return the list: the `Gather` of a single process."""
    return items


Record = TypeVar("Record")
Result = TypeVar("Result")


class PerImageMetric(ABC, Generic[Record, Result]):
    """A metric over the images of all ranks; each is processed once, on one rank, and its record holds no masks."""

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)
        self._records: list[tuple[str, Record]] = []  # image id, what is kept of the image

    def process(self, images: Sequence[EvaluatedImage]) -> None:
        """Add images with their detections."""
        self._records.extend((image.sample.image_id, self._record(image)) for image in images)

    def evaluate(self, gather: Gather = single_process) -> Result | None:
        """Return the result over the images of all ranks; None on ranks for which `gather` returns None."""
        gathered: list[tuple[str, Record]] | None = gather(self._records)
        if gathered is None:
            return None
        repeated = [image_id for image_id, count in Counter(key for key, _ in gathered).items() if count > 1]
        if repeated:
            raise RuntimeError(f"{len(repeated)} images were processed more than once, such as {min(repeated)}")
        # In the order of their ids, which does not depend on the number of ranks.
        return self._result([record for _, record in sorted(gathered, key=lambda entry: entry[0])])

    @abstractmethod
    def _record(self, image: EvaluatedImage) -> Record:
        """Return what is kept of an image."""

    @abstractmethod
    def _result(self, records: Sequence[Record]) -> Result:
        """Return the result over all records, which are sorted by image id."""
