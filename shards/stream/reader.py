"""Planned reads: the samples to come are fetched as few ranges, in bounded memory, without a local disk.

`shards.stream.read_plan` decides what to request. The reader compares each sample with the index's crc32, and frees it
as soon as it was handed out, whatever else its range holds. A sample in the cache on a local disk is not requested.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import astuple, dataclass, field
from operator import add, sub
from typing import TYPE_CHECKING, Self

from isal.isal_zlib import crc32  # the checksum of zlib, 15 times as fast

from shards.common.back_off import DAMAGED_READS, attempts
from shards.common.errors import DatasetError, SampleError, UnavailableSampleError
from shards.common.text import counted
from shards.format.index import Index
from shards.storage.explain import explain, storage_errors
from shards.storage.local_files import expect, read_file
from shards.storage.location import Location
from shards.storage.object_store import find_settings
from shards.storage.reads import Read, ReadStatistics, Received, start_read
from shards.stream.read_plan import ByteRange, ReadPlan

if TYPE_CHECKING:  # it needs Unix, which reading does not
    from shards.stream.sample_cache import SampleCache

log = logging.getLogger("shards.stream.reader")

Replace = Callable[[int, SampleError], tuple[int, memoryview]]

READ_AHEAD = 128 * 2**20
STALL_S = 30.0


@dataclass
class SampleStatistics:
    """Running totals of reading."""

    samples: int = 0  # that were read
    cache_hits: int = 0  # samples that came from the cache
    requests: int = 0  # sent to storage
    nbytes: int = 0  # received from storage
    retries: int = 0  # requests that were repeated or continued

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(add, astuple(self), astuple(other)))

    def since(self, before: Self) -> Self:
        """Return the totals since `before` was taken (copied, if it is still counting)."""
        return type(self)(*map(sub, astuple(self), astuple(before)))


@dataclass
class SampleReader:
    """Reads samples of one split in a given order."""

    root: Location  # of the dataset
    index: Index  # of the split
    # Bytes of samples that may be in memory ahead of need. A larger sample is still read; the gaps between neighbours
    # add less than a quarter, and the range that is being split is in memory twice.
    read_ahead: int = READ_AHEAD
    cache: SampleCache | None = None  # not used for a dataset on a local disk
    stall_s: float = STALL_S  # a wait for one range of more seconds is logged, and again after twice the time
    statistics: SampleStatistics = field(default_factory=SampleStatistics)  # several readers may share them

    def __post_init__(self) -> None:
        if not 0 < self.stall_s < float("inf"):
            raise DatasetError(f"stall_s is {self.stall_s}: it must be a number of seconds above 0")
        if self.root.is_local:
            self.cache = None
            return
        with storage_errors(str(self.root)):
            find_settings(self.root)  # once, instead of in each loader process

    def read(
        self, rows: Iterable[int | None], *, who: str = "the reader", replace: Replace | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield (row, bytes) for every row of the index, in the given order; `rows` may be endless.

        They are None for a batch without a sample of this index, which bounds the search for more. `who` is named in
        the log if storage stalls. An UnavailableSampleError is raised if a sample cannot be read, a SampleError if its
        crc32 stays wrong; then `replace`, if given, returns another row and its bytes.
        """
        plan = ReadPlan(self.index, iter(rows), self.read_ahead, self._is_cached)
        ranges: dict[int, _Range] = {}  # by row; rows that are in the cache have none
        try:
            while True:
                for wanted in plan.ask():
                    ranges.update(dict.fromkeys(wanted.rows, self._request(wanted)))
                if (taken := plan.take()) is None:
                    return
                row, done = taken
                requested = ranges.pop(row, None) if done else ranges.get(row)
                yield self._sample_or(replace, row, requested, done, who)
        finally:
            for one in ranges.values():
                one.cancel()

    def read_one(self, row: int, *, who: str = "the reader") -> memoryview:
        """Return the bytes of one sample, outside of any order; errors as in `read`."""
        return self._sample(row, None, True, who)

    def _sample_or(
        self, replace: Replace | None, row: int, requested: _Range | None, done: bool, who: str
    ) -> tuple[int, memoryview]:
        try:
            return row, self._sample(row, requested, done, who)
        except SampleError as error:
            if replace is None:
                raise
            return replace(row, error)

    def _is_cached(self, row: int) -> bool:
        return self.cache is not None and self.cache.has(self.cache.key(self.index, row))

    def _request(self, wanted: ByteRange) -> _Range:
        location = self.root / self.index.shard_paths[wanted.shard]
        return _LocalRange(location, wanted) if self.root.is_local else _RemoteRange(location, wanted, self.stall_s)

    def _sample(self, row: int, requested: _Range | None, done: bool, who: str) -> memoryview:
        """Return one sample, from the cache if it was not `requested`; `done`: its bytes are not needed again."""
        key = "" if self.cache is None else self.cache.key(self.index, row)
        if requested is None and self.cache is not None and (data := self.cache.get(key)) is not None:
            if crc32(data) == int(self.index.crc32[row]):
                self.statistics.cache_hits += 1
                self.statistics.samples += 1
                return memoryview(data)
            self.cache.drop(key)
        checked = self._checked(row, self._from_range(requested, row, done, who), who)
        if self.cache is not None:
            self.cache.put(key, checked)
        self.statistics.samples += 1
        return checked

    def _from_range(self, requested: _Range | None, row: int, done: bool, who: str) -> memoryview:
        """Return the bytes of one sample, as soon as its range (if None: one for this sample alone) has arrived."""
        requested = requested or self._request(ByteRange.of(self.index, row))
        try:
            data = requested.sample(self.index, row, done, who)
        except Exception as error:
            reason = explain(error, str(requested.location)) or repr(error)
            raise UnavailableSampleError(f"{self._where(row)}: cannot be read: {reason}") from error
        finally:
            read, requested.statistics = requested.statistics, ReadStatistics()  # counted once
            self.statistics.requests += read.requests
            self.statistics.nbytes += read.nbytes
            self.statistics.retries += read.retries
        nbytes = int(self.index.nbytes[row])
        if len(data) != nbytes:
            raise UnavailableSampleError(
                f"{self._where(row)}: cannot be read: the object ends before the sample does, with {len(data)} of its "
                f"{nbytes} bytes: the shard is truncated; build the dataset again"
            )
        return data

    def _checked(self, row: int, data: memoryview, who: str) -> memoryview:
        """Return the bytes once their crc32 is that of the index; wrong bytes are fetched again, on their own."""
        wanted = int(self.index.crc32[row])
        for attempt in attempts(DAMAGED_READS):
            if attempt > 1:
                self.statistics.retries += 1
                data = self._from_range(None, row, True, who)
            if (found := crc32(data)) == wanted:
                return data
        raise SampleError(
            f"{self._where(row)}: crc32 is {found:08x}, the index says {wanted:08x}, "
            f"after {DAMAGED_READS} reads: the shard was replaced or damaged; build the dataset again"
        )

    def _where(self, row: int) -> str:
        shard = self.root / self.index.shard_paths[int(self.index.shard[row])]
        return f"{shard}: sample {self.index.image_id(row)} at offset {int(self.index.offset[row])}"


class _LocalRange:
    """A range of a local file: the kernel reads ahead, and each sample is read when it is needed."""

    def __init__(self, location: Location, wanted: ByteRange) -> None:
        self.location = location
        self.statistics = ReadStatistics(requests=1)
        expect(location.path, wanted.start, wanted.end)

    def sample(self, index: Index, row: int, done: bool, who: str) -> memoryview:
        """Return the bytes of one sample, fewer if the file ends early."""
        start = int(index.offset[row])
        data = read_file(self.location.path, start, start + int(index.nbytes[row]))
        self.statistics.nbytes += len(data)
        return memoryview(data)

    def cancel(self) -> None:
        """Do nothing: the kernel reads ahead at its own discretion."""


class _RemoteRange:
    """A range that was requested from storage, and is split into its samples when the first of them is needed."""

    def __init__(self, location: Location, wanted: ByteRange, stall_s: float) -> None:
        self.location, self.wanted, self.stall_s = location, wanted, stall_s
        self.statistics = ReadStatistics()
        self._samples: dict[int, memoryview] = {}  # by row, empty until the range is split
        read = Read(location, wanted.start, wanted.end)
        self._future: Future[Received] | None = start_read(read, statistics=self.statistics)

    def sample(self, index: Index, row: int, done: bool, who: str) -> memoryview:
        """Return the bytes of one sample, fewer if the object ends early; `done`: free them."""
        if self._future is not None:
            self._wait(self._future, who)
            self._samples = self._split(self._future.result(), index)
            self._future = None
        return self._samples.pop(row) if done else self._samples[row]

    def cancel(self) -> None:
        """Give up a read that is under way."""
        if self._future is not None:
            self._future.cancel()

    def _split(self, data: Received, index: Index) -> dict[int, memoryview]:
        rows = self.wanted.rows
        starts = index.offset[rows] - self.wanted.start
        ends = starts + index.nbytes[rows]
        # Copies, so that each sample can be freed on its own.
        return {row: memoryview(data.cut(start, end)) for row, start, end in zip(rows, starts, ends)}

    def _wait(self, future: Future[Received], who: str) -> None:
        """Wait until the range has arrived or failed; log a long wait, and its end."""
        if future.done():
            return
        began, timeout, stalled = time.monotonic(), self.stall_s, False
        while not wait([future], timeout=timeout).done:
            stalled, timeout = True, 2 * timeout
            trouble = f", the last because of: {self.statistics.trouble}" if self.statistics.trouble else ""
            what = f"bytes {self.wanted.start} to {self.wanted.end} of {self.location}"
            so_far = f"{self.statistics.nbytes} received, {counted(self.statistics.retries, 'retry', 'retries')}"
            log.warning("%s has waited %.0f s for %s: %s%s", who, time.monotonic() - began, what, so_far, trouble)
        if stalled and future.exception() is None:
            log.warning("%s has data again, after %.0f s", who, time.monotonic() - began)


_Range = _LocalRange | _RemoteRange
