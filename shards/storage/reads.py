"""Many reads of objects and byte ranges at once, in threads.

obstore carries the reads where it serves (`shards.storage.object_store`): the received part of a broken body is kept,
the next request continues there, and an ETag ties the parts of one object together. Any other file system is read
through fsspec, and a range that fails is read again from its start.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from typing import Any, TypeVar

from shards.common.back_off import delay
from shards.common.text import counted, one_line
from shards.storage import location as storage
from shards.storage.explain import is_unreachable, library_of, plain_error
from shards.storage.location import Location
from shards.storage.object_store import Opened, move_to_region, open_object
from shards.storage.store_errors import (
    BeyondEndError,
    NoRangesError,
    ReplacedError,
    TooLargeError,
    TransientError,
    UnreachableError,
    WrongBytesError,
    WrongRegionError,
    as_os_error,
)

ATTEMPTS = 5  # in a row without progress
ATTEMPTS_AT_START = 3  # to connect, of the reads through fsspec that come first: no network is reported within seconds
# Bytes of one answer. All that arrives is kept, but an answer with less, within the time limits of
# `shards.storage.object_store`, means a server or proxy in trouble: a range would take hours at that rate.
PROGRESS = 1024
SLOWEST_READ = 2**14  # bytes per second; a slower read from another file system than obstore's is aborted
IN_FLIGHT = 32
HTTP_CLIENTS = ("aiohttp", "httpcore", "httpx", "httpx2")  # errors that are no OSError; s3fs retries botocore's

T = TypeVar("T")
Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class Read:
    """A whole object (`end` is None), or its bytes `start` to `end` (exclusive).

    A whole object of S3 is checked against its ETag if that is an MD5. An object longer than `largest` is not read.
    With an `etag`, the read fails unless the object has it (a weak one, W/"...", is ignored; so are those of file
    systems that only fsspec reads).
    """

    location: Location
    start: int = 0
    end: int | None = None
    largest: int | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Description:
    """A store's description of an object.

    Attributes:
        size: in bytes; None if unknown.
        etag: with its quotes; "" if there is none.
        changed: time of the last change, in the store's own form; "" if unknown.
    """

    size: int | None
    etag: str = ""
    changed: str = ""


@dataclass
class ReadStatistics:
    """Totals of requests sent, bytes received, and requests repeated or continued, with the reason of the last one."""

    requests: int = 0
    nbytes: int = 0
    retries: int = 0
    trouble: str = ""


class Received:
    """The bytes of a read, in the pieces in which they arrived: a large range is not copied to join them."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = [memoryview(part) for part in parts]
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)

    def cut(self, start: int, end: int) -> bytes:
        """Return a copy of the bytes `start` to `end` (exclusive), or fewer if they end before."""
        pieces = []
        for number in range(bisect_right(self._ends, start), len(self._parts)):
            begin = self._ends[number] - len(self._parts[number])
            if begin >= end:
                break
            pieces.append(self._parts[number][max(start - begin, 0) : end - begin])
        return b"".join(pieces)


# Errors that another attempt cannot fix.
FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    TooLargeError,
    ReplacedError,
    NoRangesError,
)


def read_many(
    reads: Sequence[Read],
    *,
    in_flight: int = IN_FLIGHT,
    statistics: ReadStatistics | None = None,
    before_fork: bool = False,
) -> list[bytes | Exception]:
    """Do many reads concurrently and return the results in the same order.

    Errors that may pass (timeouts, 5xx, broken connections, short answers) are retried with back-off. The result of a
    failed read is its exception: FileNotFoundError, PermissionError, or another one that `shards.storage.explain`
    knows. If the object ends within the range, the result is shorter.

    Args:
        reads: what to read.
        in_flight: reads at a time.
        statistics: running totals to add to.
        before_fork: read through fsspec, so that this process can fork others that read with obstore.
    """
    statistics = statistics or ReadStatistics()
    return _all(lambda read: bytes(_read(read, statistics, before_fork)), reads, in_flight)


def describe_many(
    locations: Sequence[Location], *, in_flight: int = IN_FLIGHT, statistics: ReadStatistics | None = None
) -> list[Description | Exception]:
    """Describe many objects concurrently, in the same order; the result of a failure is its exception.

    Where obstore serves, this reads an object's first byte. The answer has the same headers as a HEAD, and needs no
    other permission than reading, not even with a signed URL.
    """
    return _all(partial(_describe, statistics=statistics or ReadStatistics()), locations, in_flight)


def start_read(read: Read, *, statistics: ReadStatistics | None = None) -> Future[Received]:
    """Start a read in the background; the future's result or exception is that of `read_many`."""
    return _threads(os.getpid()).submit(_read, read, statistics or ReadStatistics())


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Return the threads of this process: a forked child has none of its parent's."""
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="read")


def _all(ask: Callable[[Asked], T], things: Sequence[Asked], in_flight: int) -> list[T | Exception]:
    answers: list[Any] = [None] * len(things)
    numbers, lock = iter(range(len(things))), threading.Lock()
    stopped = False

    def work() -> None:
        while not stopped:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                answers[number] = ask(things[number])
            except Exception as error:
                answers[number] = error

    pool = _threads(os.getpid())
    workers = [pool.submit(work) for _ in range(min(in_flight, len(things)))]
    try:
        for worker in workers:
            worker.result()
    finally:
        stopped = True
    return answers


def _read(read: Read, statistics: ReadStatistics, before_fork: bool = False) -> Received:
    if read.end is not None and read.end <= read.start:
        return Received([])
    if before_fork or open_object(read.location) is None:
        return _attempted(_FilesystemRead(read, statistics))
    return _attempted(_StoreRead(read, statistics))


def _describe(location: Location, statistics: ReadStatistics) -> Description:
    if open_object(location) is not None:
        first = _StoreRead(Read(location, 0, 1), statistics)
        _attempted(first)
        if first.size is None:  # an object without a first byte
            first = _StoreRead(Read(location), statistics)
            _attempted(first)
        return Description(first.size, first.etag, first.changed)
    statistics.requests += 1
    info = location.fs.info(location.path)
    changed = next((info[name] for name in ("mtime", "updated", "LastModified", "last_modified") if info.get(name)), "")
    return Description(info.get("size"), str(info.get("ETag") or info.get("etag") or ""), str(changed))


@dataclass
class _FilesystemRead:
    """A read through fsspec."""

    read: Read
    statistics: ReadStatistics
    received: int = 0

    def attempt(self) -> Received:
        """Read once, with a time limit if the file system is asynchronous: a thread cannot be ended."""
        read, limit = self.read, {}
        fs = read.location.fs
        if fs.async_impl and read.end is not None:
            limit["timeout"] = storage.READ_TIMEOUT_S + (read.end - read.start) / SLOWEST_READ
        try:
            data = fs.cat_file(read.location.path, start=read.start, end=read.end, **limit)
        except TimeoutError as error:
            reason = str(error) or (f"no answer came in {limit['timeout']:.0f} s" if limit else "it took too long")
            raise TransientError(reason) from error
        except Exception as error:
            plain = plain_error(error)
            if plain is not error:
                raise plain from error
            if isinstance(error, OSError) or library_of(error) not in HTTP_CLIENTS:
                raise
            kind = UnreachableError if is_unreachable(error) else TransientError
            raise kind(one_line(error)) from error
        if read.largest is not None and len(data) > read.largest:
            raise TooLargeError(f"{len(data)} bytes, the limit is {read.largest}")
        self.statistics.nbytes += len(data)
        return Received([data])


@dataclass
class _StoreRead:
    """A read through obstore, which may take several answers."""

    read: Read
    statistics: ReadStatistics  # counts all bytes, including those that are dropped
    received: int = 0  # bytes
    size: int | None = None  # of the whole object
    etag: str = ""
    changed: str = ""
    _parts: list[Any] = field(default_factory=list)
    _wrong_md5: str = ""  # of an earlier body that did not match its ETag

    def attempt(self) -> Received:
        """Send one request for what is missing, and return the bytes if the object's are complete and right."""
        opened = open_object(self.read.location)
        assert opened is not None
        try:
            self._receive(opened)
        except Exception as error:
            error = as_os_error(error, self.read.location.url)
            if isinstance(error, WrongRegionError):
                moved = move_to_region(opened, self.read.location, error.region)
                kind = TransientError if moved else PermissionError
                raise kind(f"the bucket is in another region: {error}") from error
            if isinstance(error, ReplacedError) and not self._bound:
                self._drop()
                raise TransientError("the object was replaced while it was read") from error
            if isinstance(error, BeyondEndError):
                return Received([])
            raise error from None
        if self.missing > 0:  # although the answer itself was complete
            raise TransientError(f"the answer ended {counted(self.missing, 'byte')} early")
        if not self._is_right(opened):
            self._drop()
            raise WrongBytesError("the bytes do not have the MD5 of the store's ETag")
        return Received(self._parts)

    @property
    def missing(self) -> int:
        """Bytes that have not arrived, judging by the object's size; at most 0 if all have."""
        if self.size is None:
            return 0
        end = self.size if self.read.end is None else min(self.read.end, self.size)
        return end - self.read.start - self.received

    @property
    def _bound(self) -> str:
        """The ETag that the caller demands."""
        return "" if self.read.etag.startswith("W/") else self.read.etag

    def _receive(self, opened: Opened) -> None:
        import obstore

        options: dict[str, Any] = {}
        start = self.read.start + self.received
        if self.read.end is not None:
            options["range"] = (start, self.read.end)
        elif start:
            options["range"] = {"offset": start}
        bound = self._bound or (self.etag if self.received and not self.etag.startswith("W/") else "")
        if bound:
            options["if_match"] = bound  # an error is better than the rest of another object
        answer = obstore.get(opened.store, opened.path, options=options)  # type: ignore[arg-type]
        meta = answer.meta
        self.size, self.etag = meta["size"], meta["e_tag"] or ""
        self.changed = str(meta["last_modified"])
        if self.read.largest is not None and self.size > self.read.largest:
            raise TooLargeError(f"{self.size} bytes, the limit is {self.read.largest}")
        for part in answer.stream(min_chunk_size=1):  # in the pieces in which it arrives
            self._parts.append(part)
            self.received += len(part)
            self.statistics.nbytes += len(part)

    def _drop(self) -> None:
        self._parts.clear()
        self.received = 0

    def _is_right(self, opened: Opened) -> bool:
        """Return whether the bytes of a whole object of S3 match its ETag, as far as that is an MD5.

        It is not if the object was put in parts or is encrypted with a key of KMS: the form of the ETag gives the
        first away, and for the second, two equal bodies that do not match settle it for the whole bucket.
        https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
        """
        tag, bucket = self.etag.strip('"').lower(), opened.settings.bucket
        whole = self.read.end is None and not self.read.start
        known = _etag_is_md5.get(bucket)
        if not whole or opened.settings.kind != "s3" or known is False or not re.fullmatch(r"[0-9a-f]{32}", tag):
            return True
        digest = hashlib.md5(usedforsecurity=False)
        for part in self._parts:
            digest.update(part)
        found = digest.hexdigest()
        if found == tag:
            _etag_is_md5[bucket] = True
            return True
        if found == self._wrong_md5 and known is None:
            _etag_is_md5[bucket] = False
            return True
        self._wrong_md5 = found
        return False


_etag_is_md5: dict[str, bool] = {}  # by bucket


def _attempted(what: _FilesystemRead | _StoreRead) -> Received:
    """Return the result of the first attempt that succeeds; raise the last error.

    Attempts are counted from the last one that brought data. After the end of the main thread there is only one.
    """
    statistics, failures = what.statistics, 0
    while True:
        before = what.received
        try:
            statistics.requests += 1
            return what.attempt()
        except OSError as error:
            failures = 0 if what.received - before >= PROGRESS else failures + 1
            at_start = isinstance(what, _FilesystemRead) and is_unreachable(error)
            most = min(ATTEMPTS, ATTEMPTS_AT_START) if at_start else ATTEMPTS
            if isinstance(error, FINAL) or failures >= most or not threading.main_thread().is_alive():
                raise
            statistics.retries += 1
            statistics.trouble = one_line(error) or type(error).__name__
        time.sleep(delay(failures + 1))
