"""Which bytes to ask for, and when: few ranges, in time, in bounded memory. Arithmetic on the index, no I/O.

The next `HORIZON` samples are known. Those of the *look-ahead*, a quarter of the budget, are asked for, in order, so
that the line is never idle. What is asked for grows to a range: its neighbours in the shard come along where they are
wanted within the horizon, however late, as long as there is room, and wait in memory. So a shuffled window is read as
runs of neighbours even where memory holds a part of it only. A range takes at most a quarter of what is free: they
become shorter as memory fills up, instead of long ones here and single samples there.

The look-ahead starts small, so that the first sample comes after one round trip, and grows with what was consumed.

The horizon of a dataset that is rare in a mix would be millions of batches away: finding them would take minutes before
the first one. So each call looks at no more than `HORIZON` batches that hold none of its samples, unless the very next
sample is beyond; the next calls look further.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shards.format.index import Index

HORIZON = 2048  # samples: a window of each lane, at the defaults
FIRST_LOOK_AHEAD = 2**20
MAX_RANGE = 4 * 2**20  # one request; several of them fill the line
MAX_GAP = 64 * 2**10  # bytes between two wanted samples that are cheaper to read than to ask around

_END = -1  # in place of a row


@dataclass(frozen=True, slots=True)
class Span:
    """One range request: bytes `start` to `end` of a shard, which hold the consecutive `rows` of the index."""

    shard: int
    start: int
    end: int
    rows: range


class Plan:
    """The requests for samples of one split in a given order.

    Call `ask` for what to request now, then `take` for the sample that comes next, and so on. What was asked for and
    not taken is never more than `budget` bytes, or one sample that is larger. Two neighbours share a range where the
    gap between them is at most `MAX_GAP` and a quarter of the joining one (so that what is read in vain stays below a
    quarter), and the range stays within `MAX_RANGE`.

    Attributes:
        held: bytes of the samples that were asked for and are still to be taken.
    """

    def __init__(self, index: Index, rows: Iterator[int | None], budget: int, is_cached: Callable[[int], bool]) -> None:
        """
        Args:
            rows: of the index, in the order in which they will be taken; may be endless. None for each batch that holds
                none of them.
            budget: bytes.
            is_cached: whether a row needs no request; asked when it comes into the look-ahead.
        """
        self._index, self._rows, self._budget, self._is_cached = index, rows, budget, is_cached
        self._largest = int(index.nbytes.max(initial=0))
        self._near: deque[int] = deque()  # the look-ahead
        self._far: deque[int] = deque()  # known beyond it
        self._wanted: Counter[int] = Counter()  # how often a row is in both
        self._wanted_near: Counter[int] = Counter()
        self._asked: set[int] = set()
        self._near_bytes = self._taken_bytes = 0
        self.held = 0

    def ask(self) -> list[Span]:
        """What to request now, what is needed first at the head."""
        self._look_out()
        look_ahead = min(self._budget // 4, FIRST_LOOK_AHEAD + 2 * self._taken_bytes)
        new = self._advance(look_ahead)
        if not new:
            return []
        spans: list[Span] = []
        own = set(new)
        for row in new:
            if row in own:
                free = min(self._budget - self._largest - self.held, look_ahead)
                spans.append(self._grown(row, own, free // 4))
        return spans

    def take(self) -> tuple[int, bool] | None:
        """The row that comes next, and whether its bytes are needed no more after it; None at the end."""
        if not self._near:
            return None
        row = self._near.popleft()
        size = self._size(row)
        self._near_bytes -= size
        self._taken_bytes += size
        done = not _decrease(self._wanted_near, row)
        _decrease(self._wanted, row)
        if done and row in self._asked:  # where it comes again after the look-ahead, it is read again
            self._asked.remove(row)
            self.held -= size
        return row, done

    def _look_out(self) -> None:
        """Know what comes within the horizon, as far as that is found at little cost."""
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
        """Let samples into the look-ahead; returns those that are to be requested."""
        new = []
        while self._far:
            row = self._far[0]
            size = self._size(row)
            if self._near and self._near_bytes + size > look_ahead:
                break
            if row not in self._asked and not self._is_cached(row):
                if self._near and self.held + size > self._budget:
                    break
                new.append(row)
                self._hold(row, size)
            self._near.append(self._far.popleft())
            self._wanted_near[row] += 1
            self._near_bytes += size
        return new

    def _grown(self, row: int, own: set[int], room: int) -> Span:
        """The range of a row with its neighbours: those of `own`, which are asked for now anyway, and others as far as
        there is room."""
        own.remove(row)
        shard, start, end = self._place(row)
        first = last = row
        for step in (1, -1):
            neighbour = row + step
            while 0 <= neighbour < len(self._index):
                other, begin, stop = self._place(neighbour)
                size, gap = stop - begin, begin - end if step > 0 else start - stop
                if other != shard or gap > min(MAX_GAP, size // 4) or max(end, stop) - min(start, begin) > MAX_RANGE:
                    break
                if neighbour in own:
                    own.remove(neighbour)
                elif size <= room and self._wanted[neighbour] and neighbour not in self._asked:
                    if self._is_cached(neighbour):
                        break
                    room -= size
                    self._hold(neighbour, size)
                else:
                    break
                start, end = min(start, begin), max(end, stop)
                first, last = min(first, neighbour), max(last, neighbour)
                neighbour += step
        return Span(shard, start, end, range(first, last + 1))

    def _hold(self, row: int, size: int) -> None:
        self._asked.add(row)
        self.held += size

    def _size(self, row: int) -> int:
        return int(self._index.nbytes[row])

    def _place(self, row: int) -> tuple[int, int, int]:
        start = int(self._index.offset[row])
        return int(self._index.shard[row]), start, start + int(self._index.nbytes[row])


def _decrease(counter: Counter[int], row: int) -> int:
    """Count one less; a row that is at none leaves the counter."""
    left = counter[row] - 1
    if left:
        counter[row] = left
    else:
        del counter[row]
    return left
