"""In which order an epoch visits the samples, as batches: arithmetic on arrays, no I/O, no state.

Training reads an endless row of global batches G = 0, 1, 2, ...; rank r of W takes G = r, r + W, r + 2W, ... So every
rank has the same number of batches at all times, and the position of a run is the one integer G, whatever the number of
ranks and workers that read before or will read after it.

An epoch
  1. permutes the chunks of the split (runs of neighbours of about `chunk_bytes` in one shard) and turns the result by a
     random amount, so that the leftovers (fewer than one batch) differ each epoch even where there is one chunk;
  2. cuts it into `lanes`, whole batches each; batch g of the epoch comes from lane g mod lanes, so a worker reads few
     shards at a time when lanes is a multiple of ranks x workers, and smaller ranges when it is not;
  3. shuffles each lane inside windows of `window` samples;
  4. if asked, forms batches of portrait or landscape images only (but for at most one mixed batch a lane).

A batch is computed from its position alone: the chunks' permutation and the windows that it touches, not the epoch, so
that a loader process holds a few kilobytes of it whatever the dataset's size (whole lanes where images are grouped, and
the epoch's visits where samples are repeated).

With repeat factors (`shards.order.repeat_factors`) an epoch visits a sample several times, as often on average as
its factor, and
always as many samples in all: the number of batches of an epoch is constant, and `epoch_of` remains a division. The
visits form passes, each with a sample at most once: every sample, then those that come twice or more, and so on. The
chunks of all passes are permuted together, so the visits of a sample are spread over the epoch while neighbours are
still read together; where two of them come into one window, they are put half a window apart. So a batch holds a sample
twice only at the border of two windows, or where the window is shorter than two batches.

Randomness is a hash (splitmix64) of seed, epoch and place, sorted: it is the same with every version of numpy, which
does not promise that for its generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.common.argument_checks import real, whole
from shards.common.errors import DatasetError
from shards.common.splitmix import fold, hashes
from shards.common.text import counted
from shards.format.index import Index
from shards.order.repeat_factors import rounded, units_of_repeats, visits_of_an_epoch

CHUNK_BYTES = 16 * 2**20
_CHUNKS, _TURN, _WINDOWS, _ROUNDING = 1, 2, 3, 4  # what a hash is for: no two uses share a key


@dataclass(frozen=True, slots=True)
class OrderSettings:
    """What decides the order, beside the index.

    Attributes:
        seed: any non-negative integer.
        batch_size: samples of a global batch, that is, of one rank's step.
        lanes: independent readings of an epoch.
        window: samples of a lane that are shuffled together.
        group_by_aspect: keep portrait and landscape images in batches of their own.
        chunk_bytes: the length of the runs that are permuted.
        repeat_threshold: t of the repeat factors (`shards.order.repeat_factors`): samples with a class that is in fewer
            than this share of all samples come more often; 0 for none.
    """

    batch_size: int
    seed: int = 0
    lanes: int = 8
    window: int = 128
    group_by_aspect: bool = False
    chunk_bytes: int = CHUNK_BYTES
    repeat_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "seed", "lanes", "window", "chunk_bytes"):
            object.__setattr__(self, name, whole(f"order: {name}", getattr(self, name)))
        object.__setattr__(self, "group_by_aspect", bool(self.group_by_aspect))
        object.__setattr__(self, "repeat_threshold", real("order: repeat_threshold", self.repeat_threshold))
        for name in ("batch_size", "lanes", "window", "chunk_bytes"):
            if getattr(self, name) < 1:
                raise DatasetError(f"order: {name} is {getattr(self, name)}: it must be at least 1")
        if self.seed < 0:
            raise DatasetError(f"order: seed is {self.seed}: it must not be negative")
        if not 0 <= self.repeat_threshold <= 1:
            raise DatasetError(f"order: repeat_threshold is {self.repeat_threshold}: it must lie between 0 and 1")


class Order:
    """The endless row of global batches over one split.

    Attributes:
        settings: what decides the order, beside the index.
        samples: N, of the split.
        visits: samples that an epoch visits, leftovers included: N, or more with repeat factors.
        fingerprint: of the index.
        index: without labels.

    Raises:
        DatasetError: an epoch has fewer samples than one batch.
    """

    def __init__(self, index: Index, settings: OrderSettings) -> None:
        self.settings = settings
        self.samples = len(index)
        self.fingerprint = index.fingerprint
        self._units = units_of_repeats(index, settings.repeat_threshold) if settings.repeat_threshold else None
        self.visits = self.samples if self._units is None else visits_of_an_epoch(self._units)
        if self.visits < settings.batch_size:
            raise DatasetError(
                f"the split has {counted(self.samples, 'sample')}, fewer than one batch of {settings.batch_size}: "
                "lower the batch size or build more samples"
            )
        self.index = index.without_labels()  # what is left is all that a loader process needs
        self._starts = chunk_starts(index.shard, index.nbytes, settings.chunk_bytes)
        self._portrait = index.height > index.width if settings.group_by_aspect else None
        self.lanes = min(settings.lanes, self.batches_per_epoch)
        self._epochs: dict[int, _Epoch] = {}
        self._pieces: dict[tuple[int, int, int], NDArray[np.int64]] = {}

    @property
    def indexes(self) -> tuple[Index, ...]:
        """The index, as the only one."""
        return (self.index,)

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return self.visits // self.settings.batch_size

    def identity(self) -> dict[str, Any]:
        """All that decides the order. A position G means the same only under an equal identity."""
        return {**asdict(self.settings), "index": self.fingerprint}

    def epoch_of(self, position: int) -> int:
        """The epoch in which global batch `position` lies."""
        return position // self.batches_per_epoch

    def visit(self, position: int) -> int:
        """A number that no two batches with the same sample share: the epoch's, or with repeats the position."""
        return self.epoch_of(position) if self._units is None else position

    def sizes(self, position: int) -> tuple[int, ...]:
        """How many samples of each dataset are in global batch `position`: all of the only one."""
        return (self.settings.batch_size,)

    def rows(self, position: int, number: int = 0) -> NDArray[np.int64]:
        """The rows of the index of dataset `number`, the only one, that are in global batch `position`."""
        return self.batch(position)

    def batch(self, position: int) -> NDArray[np.int64]:
        """The rows (batch_size,) of the index that make global batch `position`."""
        epoch, number = divmod(position, self.batches_per_epoch)
        size, (turn, lane) = self.settings.batch_size, divmod(number, self.lanes)
        return self._lane_rows(epoch, lane, turn * size, (turn + 1) * size)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The rows (batches_per_epoch, batch_size) of one epoch."""
        first = epoch * self.batches_per_epoch
        return np.stack([self.batch(first + number) for number in range(self.batches_per_epoch)])

    def endless_lane(self, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        """Samples `start` to `stop` of one lane, of which epoch follows upon epoch."""
        parts = [np.zeros(0, dtype=np.int64)]
        first, last = self._lane(lane)
        while start < stop:
            epoch, begin = divmod(start, last - first)
            end = min(begin + stop - start, last - first)
            parts.append(self._lane_rows(epoch, lane, begin, end))
            start += end - begin
        return np.concatenate(parts)

    def _lane(self, lane: int) -> tuple[int, int]:
        """The places of an epoch, from and to, that make a lane: whole batches, the first lanes one more."""
        batches, more = divmod(self.batches_per_epoch, self.lanes)
        first = lane * batches + min(lane, more)
        size = self.settings.batch_size
        return first * size, (first + batches + (lane < more)) * size

    def _lane_rows(self, epoch: int, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        """Samples `start` to `stop` of a lane of one epoch."""
        if self._portrait is not None:
            return self._kept((epoch, lane, -1), partial(self._grouped_lane, epoch, lane))[start:stop]
        window = self.settings.window
        first = start // window
        windows = range(first, (stop - 1) // window + 1)
        rows = np.concatenate([self._kept((epoch, lane, n), partial(self._window, epoch, lane, n)) for n in windows])
        return rows[start - first * window : stop - first * window]

    def _window(self, epoch: int, lane: int, number: int) -> NDArray[np.int64]:
        """The shuffled rows of a window of a lane."""
        first, last = self._lane(lane)
        start = first + number * self.settings.window
        places = np.arange(start, min(start + self.settings.window, last), dtype=np.int64)
        this = self._epoch(epoch)
        rows = this.at(places[np.argsort(hashes(places, fold(this.key, _WINDOWS)))])
        return rows if self._units is None else apart(rows)

    def _grouped_lane(self, epoch: int, lane: int) -> NDArray[np.int64]:
        first, last = self._lane(lane)
        windows = -(-(last - first) // self.settings.window)
        rows = np.concatenate([self._window(epoch, lane, number) for number in range(windows)])
        assert self._portrait is not None, "only images that are to be grouped are"
        return rows[grouped(self._portrait[rows], self.settings.batch_size)]

    def _kept(self, key: tuple[int, int, int], make: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
        """A piece of a lane, kept while its lane is read: a window serves many batches.

        Several threads may read one stream: any of them may drop a piece at any moment, but from none who has it.
        """
        piece = self._pieces.get(key)
        if piece is None:
            for old in list(self._pieces)[: 1 - 2 * self.lanes]:
                self._pieces.pop(old, None)
            piece = self._pieces[key] = make()
        return piece

    def _epoch(self, epoch: int) -> _Epoch:
        this = self._epochs.get(epoch)
        if this is None:
            # Readers look ahead into the next epoch: two are kept. Any thread may drop them, as in `_kept`.
            for old in sorted(self._epochs)[:-1]:
                self._epochs.pop(old, None)
            this = self._epochs[epoch] = self._made(epoch)
        return this

    def _made(self, epoch: int) -> _Epoch:
        key = fold(self.settings.seed, epoch)
        if self._units is None:
            return _Epoch.of(key, self._starts, self.samples)
        rows = passes(rounded(self._units, fold(key, _ROUNDING)))
        # A pass begins a chunk, as a shard does: where a row is not above the one before it.
        ahead = np.cumsum(np.diff(rows, prepend=-1) <= 0) * (int(self.index.shard.max()) + 1) + self.index.shard[rows]
        starts = chunk_starts(ahead, self.index.nbytes[rows], self.settings.chunk_bytes)
        return _Epoch.of(key, starts, len(rows), rows)


@dataclass(frozen=True)
class _Epoch:
    """The permuted chunks of an epoch.

    Attributes:
        key: of all its random numbers.
        first: (C,) where each chunk begins in the unpermuted row of visits, in the permuted order.
        ends: (C,) where each ends in the permuted row.
        turn: by how many places the permuted row is turned.
        visits: its length.
        rows: (visits,) the unpermuted row; None where it is 0, 1, 2, ...
    """

    key: np.uint64
    first: NDArray[np.int64]
    ends: NDArray[np.int64]
    turn: int
    visits: int
    rows: NDArray[np.int64] | None

    @classmethod
    def of(
        cls, key: np.uint64, starts: NDArray[np.int64], visits: int, rows: NDArray[np.int64] | None = None
    ) -> _Epoch:
        chunks = np.argsort(hashes(np.arange(len(starts)), fold(key, _CHUNKS)), kind="stable")
        lengths = np.diff(starts, append=visits)[chunks]
        return cls(key, starts[chunks], np.cumsum(lengths), int(fold(key, _TURN) % np.uint64(visits)), visits, rows)

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the index at some places, (n,), of the permuted and turned row."""
        places = (places + self.turn) % self.visits
        chunk = np.searchsorted(self.ends, places, side="right")
        before = np.concatenate([[0], self.ends])[chunk]
        found: NDArray[np.int64] = self.first[chunk] + places - before
        return found if self.rows is None else self.rows[found]


def positions(start: int, *, rank: int, world: int, worker: int = 0, workers: int = 1) -> Iterator[int]:
    """The global batches, endlessly, that one loader process of one rank reads, from position `start` on.

    A rank's batches go round its workers, which is the order in which a torch `DataLoader` asks them.
    """
    position = start + rank + world * worker
    while True:
        yield position
        position += world * workers


def evaluation_batches(
    samples: int, batch_size: int, *, rank: int, world: int, worker: int = 0, workers: int = 1
) -> Iterator[NDArray[np.int64]]:
    """The rows of one loader process in an evaluation: every sample exactly once over all ranks and workers.

    Batches are runs of neighbours, the last may be smaller, and ranks may differ by one batch.
    """
    for number in range(rank + world * worker, -(-samples // batch_size), world * workers):
        yield np.arange(number * batch_size, min((number + 1) * batch_size, samples), dtype=np.int64)


def chunk_starts(shard: NDArray[np.integer], nbytes: NDArray[np.int64], chunk_bytes: int) -> NDArray[np.int64]:
    """First row of each chunk, ascending; a chunk is a run of about `chunk_bytes` in one shard.

    Args:
        shard: (N,) the shard of each row; equal values are neighbours.
        nbytes: (N,) the length of each row in its shard.
        chunk_bytes: at least 1.
    """
    if len(shard) == 0:
        return np.zeros(0, dtype=np.int64)
    before = np.cumsum(nbytes) - nbytes
    new_shard = np.flatnonzero(np.diff(shard, prepend=shard[0] - 1))
    lengths = np.diff(new_shard, append=len(shard))
    in_shard = before - np.repeat(before[new_shard], lengths)
    chunk = in_shard // chunk_bytes
    starts = np.diff(chunk, prepend=-1) != 0
    starts[new_shard] = True
    return np.flatnonzero(starts).astype(np.int64)


def grouped(kind: NDArray[np.bool_], batch_size: int) -> NDArray[np.int64]:
    """Positions (n,) rearranged so that each batch holds one kind, but for at most one mixed batch at the end.

    Batches stand in the order in which their last member came, so that reading stays near the given order.

    Args:
        kind: (n,) n a multiple of batch_size.
        batch_size: at least 1.
    """
    full, left = [], []
    for value in (False, True):
        members = np.flatnonzero(kind == value)
        whole = len(members) // batch_size * batch_size
        full.append(members[:whole].reshape(-1, batch_size))
        left.append(members[whole:])
    batches = np.concatenate(full)
    return np.concatenate([batches[np.argsort(batches[:, -1])].reshape(-1), np.sort(np.concatenate(left))])


def passes(visits: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of an epoch in which row i comes visits[i] times: all rows that come at all, ascending, then those that
    come twice or more, and so on.

    Args:
        visits: (N,) from 0.
    """
    parts = []
    rows = np.flatnonzero(visits > 0)
    while len(rows):
        parts.append(rows)
        rows = rows[visits[rows] > len(parts)]
    return np.concatenate(parts) if parts else rows


def apart(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same rows with equal ones far from each other.

    The first of each stay in their order. The others move behind them all, or before them all where the first one
    stands in the second half: half the length lies between the two.
    """
    _, first = np.unique(rows, return_index=True)
    if len(first) == len(rows):
        return rows
    is_first = np.zeros(len(rows), dtype=bool)
    is_first[first] = True
    once, more = rows[is_first], rows[~is_first]
    behind = np.isin(more, once[: len(once) // 2])
    return np.concatenate([more[~behind], once, more[behind]])
