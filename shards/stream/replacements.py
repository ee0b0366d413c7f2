"""Samples whose content is damaged, and what takes their place in a batch.

In place of a damaged sample comes the next undamaged one of the index, in the same format (portrait or landscape), so
that batches grouped by it stay so. Neighbours in the index are random samples. The choice depends on nothing but the
dataset: not on rank, worker, position, or what was replaced before, so a run repeats it after a resume on any number of
GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shards.common.errors import SampleError, UnavailableSampleError
from shards.format.index import Index
from shards.stream.reader import SampleReader


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that was replaced: its key, the URL of its shard, and the error that it would have been.

    Two are equal if they are the same sample.
    """

    image_id: str
    shard: str
    reason: str = field(compare=False)

    def __str__(self) -> str:
        return self.reason if self.shard in self.reason else f"{self.shard}: {self.reason}"


class Replacement(NamedTuple):
    """What is in place of a damaged sample: its row in the index, its bytes, and what `parse` made of it."""

    row: int
    data: memoryview
    sample: Any


@dataclass
class Replacements:
    """Replaces damaged samples, at most `limit` different ones.

    `make` returns what the pipeline makes of the sample of a dataset (by number), of a row, and of these bytes; it
    raises a SampleError if the sample is damaged. `found` has the replaced samples, each once.
    """

    limit: int
    readers: Sequence[SampleReader]  # one per dataset
    make: Callable[[int, int, memoryview], Any]
    found: list[BadSample]
    who: str  # named in the log if storage stalls
    _rows: set[tuple[int, int]] = field(default_factory=set)  # of dataset numbers and rows, known to be damaged

    def find(self, number: int, row: int, error: SampleError) -> Replacement:
        """Return what is in place of a damaged sample of dataset `number`; SampleError if there are too many.

        An error of storage (UnavailableSampleError) says nothing about the sample, and is raised unchanged.
        """
        if isinstance(error, UnavailableSampleError):
            raise error
        self._note(number, row, error)
        for other in _following(self.readers[number].index, row):
            if (number, other) in self._rows:
                continue
            try:
                data = self.readers[number].read_one(other, who=self.who)
                return Replacement(other, data, self.make(number, other, data))
            except UnavailableSampleError:
                raise
            except SampleError as problem:
                self._note(number, other, problem)
        raise error

    def _note(self, number: int, row: int, error: SampleError) -> None:
        self._rows.add((number, row))
        reader = self.readers[number]
        shard = reader.root / reader.index.shard_paths[int(reader.index.shard[row])]
        bad = BadSample(reader.index.image_id(row), str(shard), str(error))
        if bad not in self.found:
            self.found.append(bad)
        if len(self.found) > self.limit:
            raise too_many(self.found)


def too_many(found: Sequence[BadSample]) -> SampleError:
    """Return the error of the last damaged sample, with those that were replaced before."""
    *replaced, last = found
    before = ", ".join(f"{bad.image_id} in {bad.shard}" for bad in replaced)
    return SampleError(
        f"{last} (it is one more than skip_bad allows; replaced were {before}): build these shards again, or raise "
        "skip_bad"
    )


def _following(index: Index, row: int) -> Iterator[int]:
    """Yield the rows after one, and then those before it, whose images are portraits if its image is."""
    portrait = index.height > index.width
    rows = np.roll(np.arange(len(index)), -row)[1:]
    yield from rows[portrait[rows] == portrait[row]].tolist()
