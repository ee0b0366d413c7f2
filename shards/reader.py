"""Planned reads: it knows the samples to come and fetches them as few ranges, in bounded memory, without a local disk.

The future is cut into blocks. A block's samples are sorted by place, neighbours merged into ranges, and the ranges
asked for in the order in which they are first needed, all at once, while the block before is consumed. At most two
blocks are in memory. The first block is small, so that the first sample comes after one round trip; each next one is
twice as large, up to half of the read-ahead. A sample that a cache on the machine's disk has is not asked for.
"""

from __future__ import annotations

import logging
import random
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import astuple, dataclass, field
from itertools import islice
from operator import add, sub
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shards.errors import SampleError
from shards.index import Index
from shards.ranges import Read, ReadStatistics, start_read
from shards.storage import Location, explain

if TYPE_CHECKING:  # it needs Unix, which reading does not
    from shards.cache import SampleCache

log = logging.getLogger("shards.reader")

READ_AHEAD = 64 * 2**20
FIRST_BLOCK = 2**20
MAX_RANGE = 4 * 2**20  # one request; several of them fill the line
MAX_GAP = 64 * 2**10  # bytes between two wanted samples that are cheaper to read than to ask around
ATTEMPTS = 5  # reads of a sample whose bytes are wrong
BACK_OFF_S = 0.2
STALL_S = 30.0


@dataclass
class SampleStatistics:
    """What a reader did so far.

    Attributes:
        samples: handed over.
        cache_hits: those of them that came from the cache.
        requests, nbytes, retries: of storage: requests sent, bytes received, requests that had to be repeated or
            continued.
    """

    samples: int = 0
    cache_hits: int = 0
    requests: int = 0
    nbytes: int = 0
    retries: int = 0

    def add(self, read: ReadStatistics) -> None:
        """Count a range that has come, or failed."""
        self.requests += read.requests
        self.nbytes += read.nbytes
        self.retries += read.retries

    def __add__(self, other: SampleStatistics) -> SampleStatistics:
        return SampleStatistics(*map(add, astuple(self), astuple(other)))

    def since(self, before: SampleStatistics) -> SampleStatistics:
        """What was done after `before` was copied."""
        return SampleStatistics(*map(sub, astuple(self), astuple(before)))


@dataclass(frozen=True, slots=True)
class Span:
    """One range request: bytes `start` to `end` of a shard, and the places in the block (ascending) that it serves."""

    shard: int
    start: int
    end: int
    places: tuple[int, ...]


def plan_spans(shard: NDArray[np.int32], offset: NDArray[np.int64], nbytes: NDArray[np.int64]) -> list[Span]:
    """Merge the samples of a block into ranges, in the order in which they are first needed.

    Two samples share a range when they lie in one shard, the gap between them is at most `MAX_GAP` and a quarter of the
    second one (so that what is read in vain stays below a quarter), and the range stays within `MAX_RANGE`. A sample
    that is wanted twice is read once.

    Args:
        shard, offset, nbytes: (n,) where each sample of the block lies.
    """
    spans: list[Span] = []
    places: list[int] = []
    current = (-1, 0, 0)
    for place in np.lexsort((offset, shard)):
        s, start, end = int(shard[place]), int(offset[place]), int(offset[place] + nbytes[place])
        gap = start - current[2]
        joins = (
            s == current[0]
            and gap <= min(MAX_GAP, (end - start) // 4)
            and (end - current[1] <= MAX_RANGE or end <= current[2])
        )
        if joins:
            current = (s, current[1], max(current[2], end))
            places.append(int(place))
            continue
        if places:
            spans.append(Span(*current, tuple(sorted(places))))
        current, places = (s, start, end), [int(place)]
    if places:
        spans.append(Span(*current, tuple(sorted(places))))
    return sorted(spans, key=lambda span: span.places[0])


@dataclass
class SampleReader:
    """Reads samples of one split in a given order.

    Attributes:
        root: the dataset's root.
        index: the split's index.
        read_ahead: bytes that may be in memory ahead of need. A sample larger than that is still read; what is read in
            vain between neighbours adds less than a quarter.
        cache: where samples are kept for the next time; not used for a dataset that is on a local disk anyway.
        stall_s: a wait of so many seconds for one range is told in the log, and again after twice the time.
        statistics: running totals; several readers may share them.
    """

    root: Location
    index: Index
    read_ahead: int = READ_AHEAD
    cache: SampleCache | None = None
    stall_s: float = STALL_S
    statistics: SampleStatistics = field(default_factory=SampleStatistics)

    def __post_init__(self) -> None:
        if self.root.is_local:
            self.cache = None

    def read(self, rows: Iterable[int], *, who: str = "the reader") -> Iterator[tuple[int, memoryview]]:
        """Yield (row, bytes) for every row, in the order given; `rows` may be endless.

        Args:
            rows: of the index.
            who: is told to be waiting where storage stalls, such as "rank 0".

        Raises:
            SampleError: a sample cannot be had, or its bytes do not have the index's crc32 after repeated reads.
        """
        blocks = self._blocks(iter(rows))
        ahead: deque[_Block] = deque(self._start(block, who) for block in islice(blocks, 1))
        try:
            while ahead:
                # The next block is asked for before this one is consumed: the line is never idle.
                ahead.extend(self._start(block, who) for block in islice(blocks, 1))
                yield from self._consume(ahead[0])
                ahead.popleft()
        finally:
            for block in ahead:
                for part in filter(None, block.parts):
                    part.future.cancel()

    def _blocks(self, rows: Iterator[int]) -> Iterator[NDArray[np.int64]]:
        limit, most = min(FIRST_BLOCK, self.read_ahead // 2), self.read_ahead // 2
        held: list[int] = []
        size = 0
        for row in rows:
            length = int(self.index.nbytes[row])
            if held and size + length > limit:
                yield np.array(held, dtype=np.int64)
                held, size, limit = [], 0, min(2 * limit, most)
            held.append(row)
            size += length
        if held:
            yield np.array(held, dtype=np.int64)

    def _start(self, rows: NDArray[np.int64], who: str) -> _Block:
        places = np.array([place for place, row in enumerate(rows) if not self._is_cached(int(row))], dtype=np.int64)
        wanted = rows[places]
        parts: list[_Part | None] = [None] * len(rows)
        for span in plan_spans(self.index.shard[wanted], self.index.offset[wanted], self.index.nbytes[wanted]):
            part = self._request(span)
            for place in span.places:
                parts[int(places[place])] = part
        return _Block(rows, parts, who)

    def _is_cached(self, row: int) -> bool:
        return self.cache is not None and self.cache.has(self.cache.key(self.index, row))

    def _request(self, span: Span) -> _Part:
        statistics = ReadStatistics()
        read = Read(self.root / self.index.shard_paths[span.shard], span.start, span.end)
        return _Part(span, start_read(read, statistics=statistics), statistics)

    def _consume(self, block: _Block) -> Iterator[tuple[int, memoryview]]:
        for place, number in enumerate(block.rows):
            row, part = int(number), block.parts[place]
            data = self._from_cache(row) if part is None else None
            if data is not None:
                self.statistics.cache_hits += 1
            else:
                part = part or self._request(self._alone(row))
                data = self._checked(row, self._sample(part, row, block.who), block.who)
                if self.cache is not None:
                    self.cache.put(self.cache.key(self.index, row), data)
            part = block.parts[place] = None  # a range is freed with the last sample it serves
            self.statistics.samples += 1
            yield row, data

    def _from_cache(self, row: int) -> memoryview | None:
        """A sample that the cache had when its block was planned; None if it is gone or its bytes are wrong."""
        assert self.cache is not None, "every place of a block lies in a span or in the cache"
        key = self.cache.key(self.index, row)
        data = self.cache.get(key)
        if data is not None and zlib.crc32(data) != int(self.index.crc32[row]):
            self.cache.drop(key)
            data = None
        return None if data is None else memoryview(data)

    def _sample(self, part: _Part, row: int, who: str) -> memoryview:
        """The bytes of one sample in its range, as soon as that has come."""
        if not part.future.done():
            self._wait(part, who)
        try:
            data = part.future.result()
        except Exception as error:
            reason = explain(error, str(self.root / self.index.shard_paths[part.span.shard]))
            raise SampleError(f"{self._where(row)}: cannot be read: {reason or repr(error)}") from error
        finally:
            self.statistics.add(part.take_statistics())
        if len(data) != part.span.end - part.span.start:
            raise SampleError(
                f"{self._where(row)}: cannot be read: the object ends at byte {part.span.start + len(data)}, "
                f"the index has bytes up to {part.span.end}: the shard is truncated; build the dataset again"
            )
        start = int(self.index.offset[row]) - part.span.start
        return memoryview(data)[start : start + int(self.index.nbytes[row])]

    def _wait(self, part: _Part, who: str) -> None:
        """Until the range is there, or has failed; a long wait is told, and its end."""
        began, patience, told = time.monotonic(), self.stall_s, False
        while not wait([part.future], timeout=patience).done:
            told, patience = True, 2 * patience
            trouble = f", the last because of: {part.statistics.trouble}" if part.statistics.trouble else ""
            log.warning(
                "%s has waited %.0f s for bytes %d to %d of %s: %d have come, %d retries%s",
                who,
                time.monotonic() - began,
                part.span.start,
                part.span.end,
                self.root / self.index.shard_paths[part.span.shard],
                part.statistics.nbytes,
                part.statistics.retries,
                trouble,
            )
        if told and part.future.exception() is None:
            log.warning("%s has data again, after %.0f s", who, time.monotonic() - began)

    def _checked(self, row: int, data: memoryview, who: str) -> memoryview:
        """The bytes, once their crc32 is the index's; wrong bytes are fetched again, alone."""
        wanted = int(self.index.crc32[row])
        for attempt in range(ATTEMPTS):
            if zlib.crc32(data) == wanted:
                return data
            # Jitter keeps the workers of a job from asking an overloaded server all at once again.
            time.sleep(BACK_OFF_S * 2**attempt * random.uniform(0.5, 1.5))
            self.statistics.retries += 1
            data = self._sample(self._request(self._alone(row)), row, who)
        raise SampleError(
            f"{self._where(row)}: crc32 is {zlib.crc32(data):08x}, the index says {wanted:08x}, "
            f"after {ATTEMPTS} reads: the shard was replaced or damaged; build the dataset again"
        )

    def _alone(self, row: int) -> Span:
        start = int(self.index.offset[row])
        return Span(int(self.index.shard[row]), start, start + int(self.index.nbytes[row]), (0,))

    def _where(self, row: int) -> str:
        shard = self.root / self.index.shard_paths[int(self.index.shard[row])]
        return f"{shard}: sample {self.index.image_id(row)} at offset {int(self.index.offset[row])}"


@dataclass(slots=True)
class _Part:
    span: Span
    future: Future[bytes]
    statistics: ReadStatistics

    def take_statistics(self) -> ReadStatistics:
        """What has not been counted yet: a range serves many samples and is counted once."""
        taken, self.statistics = self.statistics, ReadStatistics()
        return taken


@dataclass(slots=True)
class _Block:
    rows: NDArray[np.int64]
    parts: list[_Part | None]
    who: str
