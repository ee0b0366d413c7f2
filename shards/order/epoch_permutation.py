"""The permutation of an epoch's chunks, and rearrangements of rows that keep what is read together close."""

import numpy as np
from numpy.typing import NDArray

from shards.common.splitmix import fold, hashes

_CHUNKS, _TURN = 1, 2  # the purpose of a hash: no two uses of an epoch's key are equal


class EpochPermutation:
    """The permuted chunks of an epoch, from whose `key` all its random numbers are made.

    Chunks begin at `starts`, int64 [C], of the sequence `rows`, int64 [visits]; None if it is 0, 1, 2, ...
    """

    def __init__(
        self, key: np.uint64, starts: NDArray[np.int64], visits: int, rows: NDArray[np.int64] | None = None
    ) -> None:
        self.key, self._visits, self._rows = key, visits, rows
        chunks = np.argsort(hashes(np.arange(len(starts)), fold(key, _CHUNKS)), kind="stable")
        self._first = starts[chunks]  # [C], in permuted order
        self._ends = np.cumsum(np.diff(starts, append=visits)[chunks])  # [C], in the permuted sequence
        self._turn = int(fold(key, _TURN) % np.uint64(visits))  # by which the permuted sequence is rotated

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of the index, int64 [n], at some positions of the permuted and rotated sequence."""
        positions = (positions + self._turn) % self._visits
        chunk = np.searchsorted(self._ends, positions, side="right")
        before = np.concatenate([[0], self._ends])[chunk]
        found: NDArray[np.int64] = self._first[chunk] + positions - before
        return found if self._rows is None else self._rows[found]


def chunk_starts(shard: NDArray[np.integer], nbytes: NDArray[np.int64], chunk_bytes: int) -> NDArray[np.int64]:
    """Return the first row of each chunk, int64 [C], ascending; a chunk is a run of about `chunk_bytes` in one shard.

    `shard` and `nbytes`, [N], are the shard of each row (equal ones are neighbours) and its length; N is at least 1.
    """
    before = np.cumsum(nbytes) - nbytes
    new_shard = np.flatnonzero(np.diff(shard, prepend=shard[0] - 1))
    lengths = np.diff(new_shard, append=len(shard))
    in_shard = before - np.repeat(before[new_shard], lengths)  # [N], bytes of the shard before each row
    starts = np.diff(in_shard // chunk_bytes, prepend=-1) != 0
    starts[new_shard] = True
    return np.flatnonzero(starts).astype(np.int64)


def grouped(kind: NDArray[np.bool_], batch_size: int) -> NDArray[np.int64]:
    """Rearrange positions so that each batch holds one kind, except for at most one mixed batch at the end.

    Batches are sorted by the position of their last member, which keeps reading close to the given order. `kind` is
    bool [n], n a multiple of `batch_size`; the result is int64 [n], a permutation of 0 to n - 1.
    """
    full, left = [], []
    for value in (False, True):
        members = np.flatnonzero(kind == value)
        whole_batches = len(members) // batch_size * batch_size
        full.append(members[:whole_batches].reshape(-1, batch_size))
        left.append(members[whole_batches:])
    batches = np.concatenate(full)  # [n / B or less, B]
    return np.concatenate([batches[np.argsort(batches[:, -1])].reshape(-1), np.sort(np.concatenate(left))])


def passes(visits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of an epoch in which row i occurs `visits[i]` times.

    First all rows that occur at all, ascending, then those that occur twice or more, and so on.
    """
    return np.concatenate([np.flatnonzero(visits > number) for number in range(visits.max())])


def apart(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rearrange rows, int64 [n], so that equal ones are far from each other.

    The first occurrence of each stays in order. A repeated row moves behind all of these, or before all of these if its
    first occurrence is in the second half, so that half the length is between the two.
    """
    _, first = np.unique(rows, return_index=True)
    is_first = np.zeros(len(rows), dtype=bool)
    is_first[first] = True
    once, more = rows[is_first], rows[~is_first]
    behind = np.isin(more, once[: len(once) // 2])
    return np.concatenate([more[~behind], once, more[behind]])
