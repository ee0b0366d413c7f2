"""The order of an epoch's samples, as batches.

Training reads an endless sequence of global batches G = 0, 1, 2, ...; rank r of W takes G = r, r + W, r + 2W, ... Every
rank therefore has the same number of batches at all times, and the position of a run is the single integer G, whatever
the number of ranks and workers before and after it.

An epoch
  1. permutes the chunks of the split (runs of neighbours of about `chunk_bytes` in one shard) and rotates the result by
     a random amount, so that the leftovers (fewer than one batch) differ in each epoch even if there is only one chunk;
  2. cuts the result into `lanes` of whole batches; batch g of the epoch comes from lane g mod lanes. A worker reads few
     shards at a time if lanes is a multiple of ranks x workers, and smaller ranges otherwise;
  3. shuffles each lane within windows of `window` samples;
  4. optionally forms batches of portrait or landscape images only (except for at most one mixed batch per lane).

A batch is computed from the permutation of the chunks and the windows that it touches. A loader process therefore holds
a few kilobytes whatever the dataset's size (but whole lanes if images are grouped, and all visits of an epoch if
samples are repeated).

With repeat factors (`shards.order.repeat_factors`) an epoch visits a sample as often, on average, as its factor; the
number of batches per epoch is constant. The visits form passes, each with a sample at most once: every sample, then
those that occur twice or more, and so on. The chunks of all passes are permuted together, so that neighbours are still
read together. Two visits in one window are moved half a window apart: a batch holds a sample twice only at the border
of two windows, or if a window is shorter than two batches.

Random numbers are a hash (splitmix64) of seed, epoch and position, which no version of numpy changes.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.common.argument_checks import real, whole
from shards.common.errors import DatasetError
from shards.common.splitmix import fold, hashes
from shards.common.text import counted, shown
from shards.format.index import Index
from shards.order.epoch_permutation import EpochPermutation, apart, chunk_starts, grouped, passes
from shards.order.repeat_factors import UNIT, repeat_factors, rounded

CHUNK_BYTES = 16 * 2**20
# The purpose of a hash: no two uses of an epoch's key are equal (`EpochPermutation` has 1 and 2).
_WINDOWS, _ROUNDING = 3, 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OrderSettings:
    """Everything that determines the order, apart from the index."""

    batch_size: int  # samples per global batch, which is one step of one rank
    seed: int = 0  # 0 or more
    lanes: int = 8  # independent sequences of an epoch
    window: int = 128  # samples of a lane that are shuffled together
    group_by_aspect: bool = False  # keep portrait and landscape images in separate batches
    chunk_bytes: int = CHUNK_BYTES  # approximate length of the runs that are permuted
    # t of the repeat factors (`shards.order.repeat_factors`), 0 to 1: samples with a class that is in a smaller share
    # of all samples are repeated. 0 repeats none.
    repeat_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "seed", "lanes", "window", "chunk_bytes"):
            value = whole(f"order: {name}", getattr(self, name), 0 if name == "seed" else 1)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "group_by_aspect", bool(self.group_by_aspect))
        object.__setattr__(self, "repeat_threshold", real("order: repeat_threshold", self.repeat_threshold))
        if not 0 <= self.repeat_threshold <= 1:
            raise DatasetError(f"order: repeat_threshold is {self.repeat_threshold}: it must be between 0 and 1")


class Order:
    """The endless sequence of global batches over one split; a DatasetError if an epoch is smaller than one batch."""

    def __init__(self, index: Index, settings: OrderSettings) -> None:
        self.settings = settings
        self.samples = len(index)
        self.fingerprint = index.fingerprint
        self._units: NDArray[np.int64] | None = None
        if settings.repeat_threshold:
            self._units = np.rint(repeat_factors(index, settings.repeat_threshold) * UNIT).astype(np.int64)
        # Samples that every epoch visits, leftovers included; with repeat factors an epoch may visit one more.
        self.visits = self.samples if self._units is None else int(self._units.sum()) // UNIT
        if self.visits < settings.batch_size:
            raise DatasetError(
                f"the split has {counted(self.samples, 'sample')}, fewer than one batch of {settings.batch_size}: "
                "lower the batch size or build more samples"
            )
        self.indexes = (replace(index, labels=None),)  # of each dataset: of one; without labels, there is less to send
        self.batches_per_epoch = self.visits // settings.batch_size
        self._starts = chunk_starts(index.shard, index.nbytes, settings.chunk_bytes)
        self._portrait = index.height > index.width if settings.group_by_aspect else None
        self.lanes = min(settings.lanes, self.batches_per_epoch)
        # A reader looks ahead into the next epoch, and into the next window of each lane, which serves many batches.
        self._epochs = _Recent[EpochPermutation](2)
        self._pieces = _Recent[NDArray[np.int64]](2 * self.lanes)

    def identity(self) -> dict[str, Any]:
        """Return everything that determines which batch a position means, JSON-serialisable."""
        return {**asdict(self.settings), "index": self.fingerprint}

    def visit(self, position: int) -> int:
        """Return a number that no two batches with the same sample share: the epoch, or with repeats the position."""
        return position // self.batches_per_epoch if self._units is None else position

    def sizes(self, position: int) -> tuple[int, ...]:
        """Return the number of samples of each dataset in global batch `position`."""
        return (self.settings.batch_size,)

    def rows(self, position: int, number: int = 0) -> NDArray[np.int64]:
        """Return the rows, int64 [B], of the index of dataset `number` (0) in global batch `position`."""
        epoch, batch = divmod(position, self.batches_per_epoch)
        size, (turn, lane) = self.settings.batch_size, divmod(batch, self.lanes)
        return self._lane_rows(epoch, lane, turn * size, (turn + 1) * size)

    def endless_lane(self, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return samples `start` to `stop` of one lane, int64 [stop - start], in which epoch follows epoch."""
        parts = [np.zeros(0, dtype=np.int64)]
        first, last = self._lane(lane)
        while start < stop:
            epoch, begin = divmod(start, last - first)
            end = min(begin + stop - start, last - first)
            parts.append(self._lane_rows(epoch, lane, begin, end))
            start += end - begin
        return np.concatenate(parts)

    def _lane(self, lane: int) -> tuple[int, int]:
        """Return where a lane begins and ends (exclusive) in an epoch; the first lanes hold one batch more."""
        batches, more = divmod(self.batches_per_epoch, self.lanes)
        first = lane * batches + min(lane, more)
        size = self.settings.batch_size
        return first * size, (first + batches + (lane < more)) * size

    def _lane_rows(self, epoch: int, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        if self._portrait is not None:
            return self._pieces.get((epoch, lane), partial(self._grouped_lane, epoch, lane))[start:stop]
        window = self.settings.window
        first = start // window
        numbers = range(first, (stop - 1) // window + 1)
        windows = [self._pieces.get((epoch, lane, n), partial(self._window, epoch, lane, n)) for n in numbers]
        return np.concatenate(windows)[start - first * window : stop - first * window]

    def _window(self, epoch: int, lane: int, number: int) -> NDArray[np.int64]:
        first, last = self._lane(lane)
        start = first + number * self.settings.window
        numbers = np.arange(start, min(start + self.settings.window, last), dtype=np.int64)
        this = self._epochs.get(epoch, partial(self._permuted, epoch))
        rows = this.at(numbers[np.argsort(hashes(numbers, fold(this.key, _WINDOWS)))])
        return rows if self._units is None else apart(rows)

    def _grouped_lane(self, epoch: int, lane: int) -> NDArray[np.int64]:
        """Return the rows of a whole lane, in batches of one aspect."""
        assert self._portrait is not None, "only called if images are grouped"
        first, last = self._lane(lane)
        windows = -(-(last - first) // self.settings.window)
        rows = np.concatenate([self._window(epoch, lane, number) for number in range(windows)])
        return rows[grouped(self._portrait[rows], self.settings.batch_size)]

    def _permuted(self, epoch: int) -> EpochPermutation:
        key = fold(self.settings.seed, epoch)
        if self._units is None:
            return EpochPermutation(key, self._starts, self.samples)
        rows = passes(rounded(self._units, fold(key, _ROUNDING)))
        # A new pass begins a chunk, as a new shard does: wherever a row is not above the previous one.
        number_of_pass = np.cumsum(np.diff(rows, prepend=-1) <= 0)
        (index,) = self.indexes
        shard = number_of_pass * (int(index.shard.max()) + 1) + index.shard[rows]
        starts = chunk_starts(shard, index.nbytes[rows], self.settings.chunk_bytes)
        return EpochPermutation(key, starts, len(rows), rows)


class EvaluationOrder:
    """A finite sequence of batches that visits every sample exactly once, in the order of the index.

    Batches are runs of neighbours; the last one may be smaller. `rows` are the rows of the index to visit, int64 [n],
    ascending; None for all.
    """

    def __init__(self, index: Index, batch_size: int, rows: NDArray[np.int64] | None = None) -> None:
        self.indexes = (replace(index, labels=None),)
        self._batch_size, self._rows = batch_size, np.arange(len(index)) if rows is None else rows

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._rows) // self._batch_size)

    def visit(self, position: int) -> int:
        """Return 0: each sample is visited once."""
        return 0

    def sizes(self, position: int) -> tuple[int, ...]:
        """Return the number of samples of each dataset in batch `position`."""
        return (min(self._batch_size, len(self._rows) - position * self._batch_size),)

    def rows(self, position: int, number: int = 0) -> NDArray[np.int64]:
        """Return the rows, int64 [B], of the index of dataset `number` (0) in batch `position`."""
        return self._rows[position * self._batch_size : (position + 1) * self._batch_size]


def positions(
    start: int, *, rank: int, world: int, worker: int = 0, workers: int = 1, stop: int | None = None
) -> Iterator[int]:
    """Return the positions that loader process `worker` of a rank's `workers` reads, from `start` to before `stop`.

    The batches of a rank are dealt to its workers in turn, which is the order in which a torch `DataLoader` asks them.
    """
    first, step = start + rank + world * worker, world * workers
    return count(first, step) if stop is None else iter(range(first, stop, step))


def first_difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key whose values differ, and both values (None if missing); None if all are equal."""
    for key in {**saved, **now}:
        if saved.get(key) != now.get(key):
            return key, saved.get(key), now.get(key)
    return None


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a DatasetError if `order.identity()` of a saved position, as it was or from JSON, is another one now."""
    if not isinstance(saved, Mapping):
        raise DatasetError(f"identity is {shown(saved)}: give what order.identity() returned")
    if (found := first_difference(saved, now)) is not None:
        key, before, current = found
        what = "index (the fingerprint of dataset, split and selection)" if key == "index" else key
        raise DatasetError(
            f"order: the run was started with {what} {before!r}, now it is {current!r}: its position means another "
            "batch here; resume with the settings of the run, or start again with start=0 and no identity"
        )


@dataclass
class _Recent(Generic[T]):
    """The values that were computed last; threads that share a stream may drop them at any time."""

    limit: int
    values: dict[Hashable, T] = field(default_factory=dict)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, made if it is not kept."""
        value = self.values.get(key)
        if value is None:
            value = self.values[key] = make()
            keys = list(self.values)  # the oldest first; a copy, because another thread may change them
            for old in keys[: max(0, len(keys) - self.limit)]:
                self.values.pop(old, None)
        return value
