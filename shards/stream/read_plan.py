"""Which bytes to request, and when: few ranges, in time, in bounded memory. Arithmetic on the index, no I/O.

The next `HORIZON` samples are known. The first of them, up to a quarter of the byte budget, form the *look-ahead*: they
are requested in order, so that the connection is never idle. It starts small, so that the first sample arrives after
one round trip, and grows with what was consumed. A request grows to a range: neighbours in the shard that are needed
within the horizon are read along with it, as long as there is room, and wait in memory. A range takes at most a quarter
of the free budget: ranges become shorter as memory fills up, instead of a few long ones among single samples.

The horizon of a rare dataset in a mix would be millions of batches away. Each call therefore looks at no more than
`HORIZON` batches without a sample of the dataset, unless not even the next sample is known.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shards.format.index import Index

HORIZON = 2048  # samples: a window of each lane, at the defaults
FIRST_LOOK_AHEAD = 2**20  # bytes
MAX_RANGE = 8 * 2**20  # bytes of one request; `benchmarks/granularity.py`: longer ones gain nothing
MAX_GAP = 64 * 2**10  # bytes between two needed samples up to which they share a request

_END = -1  # in place of a row


@dataclass(frozen=True, slots=True)
class ByteRange:
    """One range request."""

    shard: int  # its position in `Index.shard_paths`
    start: int  # byte of the shard
    end: int  # exclusive
    rows: range  # of the index, whose samples are in the range

    @classmethod
    def of(cls, index: Index, row: int) -> ByteRange:
        """Return the range of one sample."""
        start = int(index.offset[row])
        return cls(int(index.shard[row]), start, start + int(index.nbytes[row]), range(row, row + 1))


class ReadPlan:
    """The requests for samples of one split in a given order.

    Call `ask` for the requests to send now, `take` for the next sample, and so on. Samples that were requested and not
    yet taken, `held`, are never more than `budget` bytes, or a single larger sample. Two neighbours share a range if
    the gap between them is at most `MAX_GAP` and a quarter of the joining sample (so that less than a quarter is read
    in vain), and the range is at most `MAX_RANGE` long.

    `rows` of the index may be endless, with None for each batch without one. A row `is_cached` if it needs no request.
    """

    def __init__(self, index: Index, rows: Iterator[int | None], budget: int, is_cached: Callable[[int], bool]) -> None:
        self._index, self._rows, self._budget, self._is_cached = index, rows, budget, is_cached
        self._largest = int(index.nbytes.max(initial=0))
        self._near: deque[int] = deque()  # the look-ahead
        self._far: deque[int] = deque()  # known, beyond the look-ahead
        self._wanted: Counter[int] = Counter()  # how often a row is in both
        self._wanted_near: Counter[int] = Counter()
        self._asked: set[int] = set()
        self._near_bytes = self._taken_bytes = 0
        self.held = 0

    def ask(self) -> list[ByteRange]:
        """Return the requests to send now, the most urgent first."""
        self._look_out()
        look_ahead = min(self._budget // 4, FIRST_LOOK_AHEAD + 2 * self._taken_bytes)
        due = self._advance(look_ahead)
        ranges, pending = list[ByteRange](), set(due)
        for row in due:
            if row in pending:
                free = min(self._budget - self._largest - self.held, look_ahead)
                ranges.append(self._range_around(row, pending, free // 4))
        return ranges

    def take(self) -> tuple[int, bool] | None:
        """Return the next row, and whether its bytes can be freed after it; None at the end."""
        if not self._near:
            return None
        row = self._near.popleft()
        size = self._size(row)
        self._near_bytes -= size
        self._taken_bytes += size
        done = not _decrease(self._wanted_near, row)
        _decrease(self._wanted, row)
        if done and row in self._asked:  # if it is needed again after the look-ahead, it is read again
            self._asked.remove(row)
            self.held -= size
        return row, done

    def _look_out(self) -> None:
        known, without = len(self._near) + len(self._far), 0
        while known < HORIZON and (without < HORIZON or not known):
            row = next(self._rows, _END)
            if row == _END:
                return
            if row is None:
                without += 1
            else:
                self._far.append(row)
                self._wanted[row] += 1
                known += 1

    def _advance(self, look_ahead: int) -> list[int]:
        """Move rows into the look-ahead; return those that must be requested."""
        due = []
        while self._far:
            row = self._far[0]
            size = self._size(row)
            if self._near and self._near_bytes + size > look_ahead:
                break
            if row not in self._asked and not self._is_cached(row):
                if self._near and self.held + size > self._budget:
                    break
                due.append(row)
                self._hold(row)
            self._near.append(self._far.popleft())
            self._wanted_near[row] += 1
            self._near_bytes += size
        return due

    def _range_around(self, row: int, pending: set[int], room: int) -> ByteRange:
        """Return the range of a row and of those neighbours that can be read along with it.

        The rows of the range are removed from `pending`; `room` is the bytes for neighbours that are only needed later.
        """
        pending.remove(row)
        one = ByteRange.of(self._index, row)
        for step in (1, -1):
            neighbour = row + step
            while (wider := self._joined(one, neighbour)) is not None:
                if neighbour in pending:
                    pending.remove(neighbour)
                elif self._size(neighbour) <= room and self._is_needed_later(neighbour):
                    room -= self._size(neighbour)
                    self._hold(neighbour)
                else:
                    break
                one = wider
                neighbour += step
        return one

    def _joined(self, one: ByteRange, neighbour: int) -> ByteRange | None:
        """Return the range with the row before or after it; None if they are better read apart."""
        if not 0 <= neighbour < len(self._index):
            return None
        other = ByteRange.of(self._index, neighbour)
        start, end = min(one.start, other.start), max(one.end, other.end)
        gap = max(one.start, other.start) - min(one.end, other.end)
        if other.shard != one.shard or gap > min(MAX_GAP, (other.end - other.start) // 4) or end - start > MAX_RANGE:
            return None
        rows = range(min(one.rows.start, neighbour), max(one.rows.stop, neighbour + 1))
        return ByteRange(one.shard, start, end, rows)

    def _is_needed_later(self, row: int) -> bool:
        return row in self._wanted and row not in self._asked and not self._is_cached(row)

    def _hold(self, row: int) -> None:
        self._asked.add(row)
        self.held += self._size(row)

    def _size(self, row: int) -> int:
        return int(self._index.nbytes[row])


def _decrease(counter: Counter[int], row: int) -> int:
    """Decrease the count of a row and return it; a row with none leaves the counter."""
    counter[row] -= 1
    return counter[row] or counter.pop(row)
