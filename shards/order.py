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

Randomness is a hash (splitmix64) of seed, epoch and place, sorted: it is the same with every version of numpy, which
does not promise that for its generators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.dataset import Index
from shards.errors import DatasetError

CHUNK_BYTES = 16 * 2**20
_U64 = np.uint64
_CHUNKS, _TURN, _WINDOWS = 1, 2, 3  # what a hash is for: no two uses share a key


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
    """

    batch_size: int
    seed: int = 0
    lanes: int = 8
    window: int = 256
    group_by_aspect: bool = False
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        for name in ("batch_size", "lanes", "window", "chunk_bytes"):
            if getattr(self, name) < 1:
                raise DatasetError(f"order: {name} is {getattr(self, name)}: it must be at least 1")
        if self.seed < 0:
            raise DatasetError(f"order: seed is {self.seed}: it must not be negative")


class Order:
    """The endless row of global batches over one split.

    Raises:
        DatasetError: the split has fewer samples than one batch.
    """

    def __init__(self, index: Index, settings: OrderSettings) -> None:
        if len(index) < settings.batch_size:
            raise DatasetError(
                f"the split has {len(index)} samples, fewer than one batch of {settings.batch_size}: "
                "lower the batch size or build more samples"
            )
        self.settings = settings
        self.samples = len(index)
        self.fingerprint = index.fingerprint
        self._chunk_starts = chunk_starts(index.shard, index.nbytes, settings.chunk_bytes)
        self._portrait = index.height > index.width if settings.group_by_aspect else None
        self._epochs: dict[int, NDArray[np.int64]] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in the split."""
        return self.samples // self.settings.batch_size

    def identity(self) -> dict[str, Any]:
        """All that decides the order. A position G means the same only under an equal identity."""
        s = self.settings
        return {
            "seed": s.seed,
            "batch_size": s.batch_size,
            "lanes": s.lanes,
            "window": s.window,
            "group_by_aspect": s.group_by_aspect,
            "chunk_bytes": s.chunk_bytes,
            "index": self.fingerprint,
        }

    def epoch_of(self, position: int) -> int:
        """The epoch in which global batch `position` lies."""
        return position // self.batches_per_epoch

    def batch(self, position: int) -> NDArray[np.int64]:
        """The rows (batch_size,) of the index that make global batch `position`."""
        rows: NDArray[np.int64] = self.epoch(self.epoch_of(position))[position % self.batches_per_epoch]
        return rows

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The rows (batches_per_epoch, batch_size) of one epoch."""
        if epoch not in self._epochs:
            # Readers look ahead into the next epoch: two are kept, never more.
            for old in sorted(self._epochs)[:-1]:
                del self._epochs[old]
            self._epochs[epoch] = epoch_rows(self._chunk_starts, self.samples, self.settings, epoch, self._portrait)
        return self._epochs[epoch]


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


def chunk_starts(shard: NDArray[np.int32], nbytes: NDArray[np.int64], chunk_bytes: int) -> NDArray[np.int64]:
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


def epoch_rows(
    starts: NDArray[np.int64],
    samples: int,
    settings: OrderSettings,
    epoch: int,
    portrait: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """The rows of one epoch as batches, (samples // batch_size, batch_size); see the module's description.

    Args:
        starts: first row of each chunk.
        samples: N, at least batch_size.
        settings: what decides the order.
        epoch: from 0.
        portrait: (N,) the images to keep apart; None for no grouping.
    """
    key = fold(settings.seed, epoch)
    batches, size = samples // settings.batch_size, settings.batch_size
    rows = _permuted_chunks(starts, samples, key)
    rows = np.roll(rows, -int(fold(key, _TURN) % _U64(samples)))[: batches * size]

    lanes = min(settings.lanes, batches)
    lane_batches = batches // lanes + (np.arange(lanes) < batches % lanes)
    lane_starts = np.concatenate([[0], np.cumsum(lane_batches * size)])
    lane = np.repeat(np.arange(lanes), lane_batches * size)
    window = (np.arange(len(rows)) - lane_starts[lane]) // settings.window
    rows = rows[np.lexsort((_hashes(len(rows), fold(key, _WINDOWS)), window, lane))]

    if portrait is not None:
        for start, end in pairwise(lane_starts):
            rows[start:end] = rows[start:end][grouped(portrait[rows[start:end]], size)]
    number = np.arange(batches)
    first = lane_starts[number % lanes] + (number // lanes) * size
    batched: NDArray[np.int64] = rows[first[:, None] + np.arange(size)]
    return batched


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


def fold(*values: int | np.uint64) -> np.uint64:
    """One 64-bit key from several non-negative integers; the order of the values matters."""
    key = _U64(0)
    for value in values:
        key = _splitmix64(np.array([int(key) ^ (int(value) & 0xFFFFFFFFFFFFFFFF)], dtype=_U64))[0]
    return key


def _permuted_chunks(starts: NDArray[np.int64], samples: int, key: np.uint64) -> NDArray[np.int64]:
    chunks = np.argsort(_hashes(len(starts), fold(key, _CHUNKS)), kind="stable")
    lengths = np.diff(starts, append=samples)[chunks]
    ends = np.cumsum(lengths)
    rows: NDArray[np.int64] = np.arange(samples, dtype=np.int64) + np.repeat(starts[chunks] - (ends - lengths), lengths)
    return rows


def _hashes(count: int, key: np.uint64) -> NDArray[np.uint64]:
    return _splitmix64(np.arange(count, dtype=_U64) ^ key)


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), a bijection."""
    x = x + _U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> _U64(31))
    return mixed
