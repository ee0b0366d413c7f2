"""Planned reads: it knows the samples to come and fetches them as few ranges, in bounded memory, without a local disk.

The future is cut into blocks. A block's samples are sorted by place, neighbours merged into ranges, and the ranges
asked for in the order in which they are first needed, all at once, while the block before is consumed. At most two
blocks are in memory. The first block is small, so that the first sample comes after one round trip; each next one is
twice as large, up to half of the read-ahead.
"""

from __future__ import annotations

import random
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from shards.errors import SampleError
from shards.index import Index
from shards.ranges import Read, ReadStatistics, start_read
from shards.storage import Location, explain

READ_AHEAD = 64 * 2**20
FIRST_BLOCK = 2**20
MAX_RANGE = 4 * 2**20  # one request; several of them fill the line
MAX_GAP = 64 * 2**10  # bytes between two wanted samples that are cheaper to read than to ask around
ATTEMPTS = 5  # reads of a sample whose bytes are wrong
BACK_OFF_S = 0.2


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
        statistics: running totals.
    """

    root: Location
    index: Index
    read_ahead: int = READ_AHEAD
    statistics: ReadStatistics = field(default_factory=ReadStatistics)

    def read(self, rows: Iterable[int]) -> Iterator[tuple[int, memoryview]]:
        """Yield (row, bytes) for every row, in the order given; `rows` may be endless.

        Raises:
            SampleError: a sample cannot be had, or its bytes do not have the index's crc32 after repeated reads.
        """
        blocks = self._blocks(iter(rows))
        ahead: deque[_Block] = deque(self._start(block) for block in islice(blocks, 1))
        try:
            while ahead:
                # The next block is asked for before this one is consumed: the line is never idle.
                ahead.extend(self._start(block) for block in islice(blocks, 1))
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

    def _start(self, rows: NDArray[np.int64]) -> _Block:
        spans = plan_spans(self.index.shard[rows], self.index.offset[rows], self.index.nbytes[rows])
        parts: list[_Part | None] = [None] * len(rows)
        for span in spans:
            part = _Part(span, self._request(span))
            for place in span.places:
                parts[place] = part
        return _Block(rows, parts)

    def _request(self, span: Span) -> Future[bytes]:
        location = self.root / self.index.shard_paths[span.shard]
        return start_read(Read(location, span.start, span.end), statistics=self.statistics)

    def _consume(self, block: _Block) -> Iterator[tuple[int, memoryview]]:
        for place, row in enumerate(block.rows):
            part = block.parts[place]
            assert part is not None, "every place of a block lies in a span"
            data = self._received(part, int(row))
            start = int(self.index.offset[row]) - part.span.start
            view = memoryview(data)[start : start + int(self.index.nbytes[row])]
            block.parts[place] = None  # a range is freed with the last sample it serves
            yield int(row), self._checked(int(row), view)

    def _received(self, part: _Part, row: int) -> bytes:
        try:
            data = part.future.result()
        except Exception as error:
            reason = explain(error, str(self.root / self.index.shard_paths[part.span.shard]))
            raise SampleError(f"{self._where(row)}: cannot be read: {reason or repr(error)}") from error
        if len(data) != part.span.end - part.span.start:
            raise SampleError(
                f"{self._where(row)}: cannot be read: the object ends at byte {part.span.start + len(data)}, "
                f"the index has bytes up to {part.span.end}: the shard is truncated; build the dataset again"
            )
        return data

    def _checked(self, row: int, data: memoryview) -> memoryview:
        """The bytes, once their crc32 is the index's; wrong bytes are fetched again, alone."""
        wanted = int(self.index.crc32[row])
        for attempt in range(ATTEMPTS):
            if zlib.crc32(data) == wanted:
                return data
            # Jitter keeps the workers of a job from asking an overloaded server all at once again.
            time.sleep(BACK_OFF_S * 2**attempt * random.uniform(0.5, 1.5))
            self.statistics.retries += 1
            start = int(self.index.offset[row])
            span = Span(int(self.index.shard[row]), start, start + int(self.index.nbytes[row]), (0,))
            data = memoryview(self._received(_Part(span, self._request(span)), row))
        raise SampleError(
            f"{self._where(row)}: crc32 is {zlib.crc32(data):08x}, the index says {wanted:08x}, "
            f"after {ATTEMPTS} reads: the shard was replaced or damaged; build the dataset again"
        )

    def _where(self, row: int) -> str:
        shard = self.root / self.index.shard_paths[int(self.index.shard[row])]
        return f"{shard}: sample {self.index.image_id(row)} at offset {int(self.index.offset[row])}"


@dataclass(frozen=True, slots=True)
class _Part:
    span: Span
    future: Future[bytes]


@dataclass(slots=True)
class _Block:
    rows: NDArray[np.int64]
    parts: list[_Part | None]
