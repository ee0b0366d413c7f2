"""Planned reads: it knows the samples to come and fetches them as few ranges, in bounded memory, without a local disk.

What to ask for is decided by `shards.stream.read_plan`; here it is asked for, waited for, checked against the
index's crc32 and
handed over. Each sample of a range is freed as soon as it was handed over, whatever else the range brought. A sample
that a cache on the machine's disk has is not asked for.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import astuple, dataclass, field
from operator import add, sub
from typing import TYPE_CHECKING

from shards.common.back_off import attempts
from shards.common.errors import DatasetError, SampleError
from shards.common.text import counted
from shards.format.index import Index
from shards.storage.explain import explain
from shards.storage.local_files import expect, read_file
from shards.storage.location import Location
from shards.storage.ranges import Bytes, Read, ReadStatistics, start_read
from shards.stream.read_plan import Plan, Span

if TYPE_CHECKING:  # it needs Unix, which reading does not
    from shards.stream.sample_cache import SampleCache

log = logging.getLogger("shards.stream.reader")

READ_AHEAD = 128 * 2**20
ATTEMPTS = 5  # reads of a sample whose bytes are wrong, in all
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


@dataclass
class SampleReader:
    """Reads samples of one split in a given order.

    Attributes:
        root: the dataset's root.
        index: the split's index.
        read_ahead: bytes of samples that may be in memory ahead of need. A sample larger than that is still read; what
            is read in vain between neighbours adds less than a quarter, and the range that is being taken apart is
            there twice.
        cache: where samples are kept for the next time; not used for a dataset that is on a local disk anyway.
        stall_s: a wait of so many seconds, above 0, for one range is told in the log, and again after twice the time.
        statistics: running totals; several readers may share them.

    Raises:
        DatasetError: `stall_s` is not above 0.
    """

    root: Location
    index: Index
    read_ahead: int = READ_AHEAD
    cache: SampleCache | None = None
    stall_s: float = STALL_S
    statistics: SampleStatistics = field(default_factory=SampleStatistics)

    def __post_init__(self) -> None:
        if not 0 < self.stall_s < float("inf"):
            raise DatasetError(f"stall_s is {self.stall_s}: it must be a number of seconds above 0")
        if self.root.is_local:
            self.cache = None

    def read(self, rows: Iterable[int | None], *, who: str = "the reader") -> Iterator[tuple[int, memoryview]]:
        """Yield (row, bytes) for every row, in the order given; `rows` may be endless.

        Args:
            rows: of the index. None for a batch without any, so that what lies far ahead is not searched for.
            who: is told to be waiting where storage stalls, such as "rank 0".

        Raises:
            SampleError: a sample cannot be had, or its bytes do not have the index's crc32 after repeated reads.
        """
        plan = Plan(self.index, iter(rows), self.read_ahead, self._is_cached)
        parts: dict[int, _Part] = {}
        try:
            while True:
                for span in plan.ask():
                    parts.update(dict.fromkeys(span.rows, self._request(span)))
                if (taken := plan.take()) is None:
                    return
                row, done = taken
                yield row, self._next(row, parts.pop(row, None) if done else parts.get(row), done, who)
        finally:
            for part in parts.values():
                if part.future is not None:
                    part.future.cancel()

    def _is_cached(self, row: int) -> bool:
        return self.cache is not None and self.cache.has(self.cache.key(self.index, row))

    def _request(self, span: Span) -> _Part:
        location = self.root / self.index.shard_paths[span.shard]
        if self.root.is_local:
            expect(location.path, span.start, span.end)
            return _Part(span, None, ReadStatistics(requests=1))
        statistics = ReadStatistics()
        return _Part(span, start_read(Read(location, span.start, span.end), statistics=statistics), statistics)

    def _next(self, row: int, part: _Part | None, done: bool, who: str) -> memoryview:
        """One sample; `part` is the range that it was asked for with, None if the cache had it; `done`: free it."""
        data = self._from_cache(row) if part is None else None
        if data is not None:
            self.statistics.cache_hits += 1
        else:
            part = part or self._alone(row)
            data = self._checked(row, self._sample(part, row, done, who), who)
            if self.cache is not None:
                self.cache.put(self.cache.key(self.index, row), data)
        self.statistics.samples += 1
        return data

    def _from_cache(self, row: int) -> memoryview | None:
        """A sample that the cache had when it was planned; None if it is gone or its bytes are wrong."""
        assert self.cache is not None, "every row that is taken was asked for or is in the cache"
        key = self.cache.key(self.index, row)
        data = self.cache.get(key)
        if data is not None and zlib.crc32(data) != int(self.index.crc32[row]):
            self.cache.drop(key)
            data = None
        return None if data is None else memoryview(data)

    def _sample(self, part: _Part, row: int, done: bool, who: str) -> memoryview:
        """The bytes of one sample in its range, as soon as that has come."""
        place = self.root / self.index.shard_paths[part.span.shard]
        start, nbytes = int(self.index.offset[row]), int(self.index.nbytes[row])
        try:
            if part.future is not None:
                self._wait(part.future, part, who)
                part.take_apart(part.future.result(), self.index)
            if part.pieces is None:
                data = memoryview(read_file(place.path, start, start + nbytes))
                part.statistics.nbytes += len(data)
            else:
                data = part.pieces.pop(row) if done else part.pieces[row]
        except Exception as error:
            raise SampleError(
                f"{self._where(row)}: cannot be read: {explain(error, str(place)) or repr(error)}"
            ) from error
        finally:
            self.statistics.add(part.take_statistics())
        if len(data) != nbytes:
            raise SampleError(
                f"{self._where(row)}: cannot be read: the object ends before the sample does, {len(data)} of whose "
                f"{nbytes} bytes are there: the shard is truncated; build the dataset again"
            )
        return data

    def _wait(self, future: Future[Bytes], part: _Part, who: str) -> None:
        """Until the range is there, or has failed; a long wait is told, and its end."""
        if future.done():
            return
        began, patience, told = time.monotonic(), self.stall_s, False
        while not wait([future], timeout=patience).done:
            told, patience = True, 2 * patience
            trouble = f", the last because of: {part.statistics.trouble}" if part.statistics.trouble else ""
            log.warning(
                "%s has waited %.0f s for bytes %d to %d of %s: %d have come, %s%s",
                who,
                time.monotonic() - began,
                part.span.start,
                part.span.end,
                self.root / self.index.shard_paths[part.span.shard],
                part.statistics.nbytes,
                counted(part.statistics.retries, "retry", "retries"),
                trouble,
            )
        if told and future.exception() is None:
            log.warning("%s has data again, after %.0f s", who, time.monotonic() - began)

    def _checked(self, row: int, data: memoryview, who: str) -> memoryview:
        """The bytes, once their crc32 is the index's; wrong bytes are fetched again, alone."""
        wanted = int(self.index.crc32[row])
        for attempt in attempts(ATTEMPTS):
            if attempt > 1:
                self.statistics.retries += 1
                data = self._sample(self._alone(row), row, True, who)
            if (found := zlib.crc32(data)) == wanted:
                return data
        raise SampleError(
            f"{self._where(row)}: crc32 is {found:08x}, the index says {wanted:08x}, "
            f"after {ATTEMPTS} reads: the shard was replaced or damaged; build the dataset again"
        )

    def _alone(self, row: int) -> _Part:
        start = int(self.index.offset[row])
        end = start + int(self.index.nbytes[row])
        return self._request(Span(int(self.index.shard[row]), start, end, range(row, row + 1)))

    def _where(self, row: int) -> str:
        shard = self.root / self.index.shard_paths[int(self.index.shard[row])]
        return f"{shard}: sample {self.index.image_id(row)} at offset {int(self.index.offset[row])}"


@dataclass(slots=True)
class _Part:
    """A range that was asked for: `future` until it was taken apart, then `pieces`, the bytes of each row. Neither for
    a file of this machine, which the kernel reads ahead."""

    span: Span
    future: Future[Bytes] | None
    statistics: ReadStatistics
    pieces: dict[int, memoryview] | None = None

    def take_apart(self, data: Bytes, index: Index) -> None:
        """Make the pieces, shorter than the index says where the object ends early, and let the future go."""
        whole, rows = memoryview(data), self.span.rows
        if len(rows) == 1:
            self.pieces = {rows[0]: whole}
        else:  # copies, so that each can be freed by itself
            starts = (index.offset[rows.start : rows.stop] - self.span.start).tolist()
            lengths = index.nbytes[rows.start : rows.stop].tolist()
            cuts = zip(rows, starts, lengths, strict=True)
            self.pieces = {row: memoryview(bytes(whole[start : start + size])) for row, start, size in cuts}
        self.future = None

    def take_statistics(self) -> ReadStatistics:
        """What has not been counted yet: a range serves many samples and is counted once."""
        taken, self.statistics = self.statistics, ReadStatistics()
        return taken
