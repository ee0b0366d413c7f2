"""Many reads of objects and byte ranges at once, over S3, http(s), and any other file system of fsspec.

S3 and http are read by plain GETs over aiohttp, signed by botocore's own signer for S3. Small ranges cost a quarter of
the processor time of the same requests through s3fs (`benchmarks/reads.py`), which limits the throughput of a few
cores. The received part of a broken body is kept, and the next request continues there; an ETag ties the parts of one
object together. Any other file system is read through fsspec, and a range that fails is read again from its start.

Connections live in the event loop thread of fsspec (`shards.storage.sessions`).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

from fsspec.asyn import get_loop

from shards.common.text import counted
from shards.storage import location as storage
from shards.storage.buckets import Address, address_of
from shards.storage.location import Location
from shards.storage.sessions import aiohttp_module, session

ATTEMPTS = 5  # in a row without a packet of data
BACK_OFF_S = 0.2  # before the second attempt, doubled each time
# Bytes. A working connection, however slow or shared, delivers whole packets (1448 bytes over Ethernet). Less than one
# within the read timeout means a server or proxy in trouble; a range would take hours at that rate.
PACKET = 1024
SLOWEST_READ = 2**14  # bytes per second; a slower read from another file system than S3 and http is aborted
IN_FLIGHT = 32
HTTP = ("http", "https")
REMOTE = (*HTTP, "s3", "s3a")  # read by plain GETs

Bytes = bytes | bytearray  # a result is not copied to make it immutable

T = TypeVar("T")
Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class Read:
    """A whole object (`end` is None), or its bytes `start` to `end` (exclusive).

    A whole object of S3 is checked against its ETag if that is an MD5. An object longer than `largest` is not read.
    With an `etag`, the read fails unless the object has it (S3 and http; a weak one, W/"...", is ignored).
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


class TransientError(OSError):
    """An error that may pass: 5xx, 429, 408, or a body that ended early."""


class WrongBytesError(TransientError):
    """The bytes do not match the store's checksum."""


class ReplacedError(OSError):
    """The object no longer has the ETag of the read."""


class TooLargeError(OSError):
    """The object is longer than the read allows."""


# Errors that another attempt cannot fix.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, TooLargeError, ReplacedError)


def read_many(
    reads: Sequence[Read], *, in_flight: int = IN_FLIGHT, statistics: ReadStatistics | None = None
) -> list[bytes | Exception]:
    """Do many reads concurrently and return the results in the same order.

    Errors that may pass (timeouts, 5xx, broken connections, short answers) are retried with back-off, on S3 and http
    from where the body broke. The result of a failed read is its exception: FileNotFoundError, PermissionError, or
    another one that `shards.storage.explain` knows. If the object ends within the range, the result is shorter.
    """
    statistics = statistics or ReadStatistics()
    return _run(_all(lambda read: _read_bytes(read, statistics), reads, in_flight))


def describe_many(
    locations: Sequence[Location], *, in_flight: int = IN_FLIGHT, statistics: ReadStatistics | None = None
) -> list[Description | Exception]:
    """Describe many objects concurrently, in the same order; the result of a failure is its exception.

    On S3 and http this reads an object's first byte. The answer has the same headers as a HEAD, and needs no other
    permission than reading, not even with a signed URL.
    """
    statistics = statistics or ReadStatistics()
    return _run(_all(lambda location: _describe(location, statistics), locations, in_flight))


def start_read(read: Read, *, statistics: ReadStatistics | None = None) -> Future[Bytes]:
    """Start a read in the background; the future's result or exception is that of `read_many`."""
    return asyncio.run_coroutine_threadsafe(_read(read, statistics or ReadStatistics()), get_loop())


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    future = asyncio.run_coroutine_threadsafe(coroutine, get_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def _all(
    ask: Callable[[Asked], Coroutine[Any, Any, T]], things: Sequence[Asked], in_flight: int
) -> list[T | Exception]:
    answers: list[Any] = [None] * len(things)
    numbers = iter(range(len(things)))

    async def worker() -> None:
        for number in numbers:
            try:
                answers[number] = await ask(things[number])
            except Exception as error:
                answers[number] = error

    await asyncio.gather(*(worker() for _ in range(min(in_flight, len(things)))))
    return answers


async def _read_bytes(read: Read, statistics: ReadStatistics) -> bytes:
    return bytes(await _read(read, statistics))


async def _read(read: Read, statistics: ReadStatistics) -> Bytes:
    if read.end is not None and read.end <= read.start:
        return b""
    if read.location.protocol in REMOTE:
        return (await _get(read, statistics)).data
    attempts = _Attempts(statistics)
    while True:
        try:
            statistics.requests += 1
            data = await _cat(read)
            statistics.nbytes += len(data)
            return data
        except (OSError, aiohttp_module().ClientError) as error:
            await attempts.failed(error, 0)


async def _cat(read: Read) -> bytes:
    """Read through fsspec, with a time limit if the file system is asynchronous: a thread cannot be ended."""
    fs, limit = read.location.fs, {}
    if fs.async_impl and read.end is not None:
        limit["timeout"] = storage.READ_TIMEOUT_S + (read.end - read.start) / SLOWEST_READ
    try:
        data = await asyncio.to_thread(fs.cat_file, read.location.path, start=read.start, end=read.end, **limit)
    except TimeoutError as error:
        reason = str(error) or (f"no answer came in {limit['timeout']:.0f} s" if limit else "it took too long")
        raise TransientError(reason) from error
    return bytes(data)


async def _describe(location: Location, statistics: ReadStatistics) -> Description:
    if location.protocol in REMOTE:
        body = await _get(Read(location, 0, 1), statistics)
        return Description(body.length, body.etag, body.changed)
    statistics.requests += 1
    info = await asyncio.to_thread(location.fs.info, location.path)
    changed = next((info[name] for name in ("mtime", "updated", "LastModified", "last_modified") if info.get(name)), "")
    return Description(info.get("size"), str(info.get("ETag") or info.get("etag") or ""), str(changed))


async def _get(read: Read, statistics: ReadStatistics) -> _Body:
    """Get an object or range by http; the received part of a broken body is kept, and the rest requested."""
    address, key = None, ""
    if read.location.protocol not in HTTP:
        bucket, _, key = read.location.url.partition("://")[2].partition("/")
        address, key = await address_of(bucket, read.location.anonymous), quote(key, safe="/~")
    body, attempts = _Body(read, statistics), _Attempts(statistics)
    while True:
        before = len(body.data)
        # For each request: an answer may have named another region of the bucket.
        url = read.location.url if address is None else f"{address.base}/{key}"
        try:
            statistics.requests += 1
            await _get_once(body, url, address)
            if body.is_right(address):
                return body
            raise WrongBytesError("the bytes do not have the MD5 of the store's ETag")
        except (OSError, aiohttp_module().ClientError) as error:
            await attempts.failed(error, len(body.data) - before)


@dataclass
class _Attempts:
    """The attempts at one read."""

    statistics: ReadStatistics
    failures: int = 0  # in a row

    async def failed(self, error: Exception, nbytes: int) -> None:
        """Wait for the next attempt, after one that received `nbytes`; raise `error` if it was the last."""
        if isinstance(error, FINAL):
            raise error
        self.failures = 0 if nbytes >= PACKET else self.failures + 1
        if self.failures >= ATTEMPTS:
            raise error
        self.statistics.retries += 1
        self.statistics.trouble = " ".join(str(error).split()) or type(error).__name__
        # Jitter keeps many processes from asking an overloaded server again at the same moment.
        await asyncio.sleep(BACK_OFF_S * 2**self.failures * random.uniform(0.5, 1.5))


@dataclass
class _Body:
    """The received part of one read."""

    read: Read
    statistics: ReadStatistics  # counts all bytes, including those that are dropped
    data: bytearray = field(default_factory=bytearray)
    etag: str = ""
    length: int | None = None  # of the whole object
    changed: str = ""
    md5: str = ""  # of the whole object, by its ETag; "" if unknown
    wrong: str = ""  # the MD5 of an earlier body that did not match

    def is_right(self, address: Address | None) -> bool:
        """Return whether the bytes match the object's MD5, if that is known; otherwise drop them."""
        if not self.md5 or address is None or self.read.end is not None or self.read.start:
            return True
        found = hashlib.md5(self.data, usedforsecurity=False).hexdigest()
        if found == self.md5:
            address.etag_is_md5 = True
            return True
        if found == self.wrong and not address.etag_is_md5:
            return True  # the same twice: this store's ETag is not an MD5
        self.wrong = found
        self.data.clear()
        return False

    @property
    def missing(self) -> int:
        """Bytes that have not arrived, judging by the object's length; at most 0 if all have."""
        if self.length is None:
            return 0
        end = self.length if self.read.end is None else min(self.read.end, self.length)
        return end - self.read.start - len(self.data)

    @property
    def headers(self) -> dict[str, str]:
        start = self.read.start + len(self.data)
        headers = {"Accept-Encoding": "identity"}
        if self.read.end is not None:
            headers["Range"] = f"bytes={start}-{self.read.end - 1}"
        elif start:
            headers["Range"] = f"bytes={start}-"
        bound = self.read.etag or (self.etag if self.data else "")
        if bound and not bound.startswith("W/"):
            headers["If-Match"] = bound  # an error is better than the rest of another object
        return headers

    def take_headers(self, answer: Any) -> None:
        """Take ETag, time of change and length from an answer's headers."""
        self.etag = answer.headers.get("ETag", "")
        self.changed = answer.headers.get("Last-Modified", "")
        total = re.fullmatch(r"bytes (?:\*|\d+-\d+)/(\d+)", answer.headers.get("Content-Range", ""))
        self.length = int(total[1]) if total else answer.content_length if answer.status == 200 else None


async def _get_once(body: _Body, url: str, address: Address | None) -> None:
    from yarl import URL

    headers = body.headers
    ranged = "Range" in headers
    if address is not None:
        headers = address.signed(url, headers)
    timeout = aiohttp_module().ClientTimeout(
        total=None, sock_connect=storage.CONNECT_TIMEOUT_S, sock_read=storage.READ_TIMEOUT_S
    )
    connections, place = await session(), URL(url, encoded=True)
    async with connections.get(place, headers=headers, timeout=timeout, allow_redirects=address is None) as answer:
        if answer.status == 412:
            if body.read.etag:
                raise ReplacedError(f"the object is no longer the one with the ETag {body.read.etag}")
            body.data.clear()
            raise TransientError("the object was replaced while it was read")
        if answer.status == 416:
            body.take_headers(answer)
            return  # the object ends before the range begins
        if answer.status not in (200, 206):
            await _refuse(answer, url, address)
        if ranged and answer.status == 200:
            if body.read.start or body.read.end is not None:
                raise TransientError("the server ignores byte ranges, without which nothing can be read from it")
            body.data.clear()  # the whole object instead of its rest
        body.take_headers(answer)
        body.md5 = _md5_of(answer.headers) if address is not None else ""
        if body.read.largest is not None and (answer.content_length or 0) > body.read.largest:
            raise TooLargeError(f"{answer.content_length} bytes, the limit is {body.read.largest}")
        await _receive(answer.content, body)
    if body.missing > 0:  # although the answer itself was complete
        raise TransientError(f"the answer ended {counted(body.missing, 'byte')} early")


async def _receive(content: Any, body: _Body) -> None:
    """Receive a body, as long as a packet of it arrives within each read timeout."""
    loop, timeout, received = asyncio.get_running_loop(), storage.READ_TIMEOUT_S, 0
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            async for chunk in content.iter_any():
                body.data += chunk
                body.statistics.nbytes += len(chunk)
                received += len(chunk)
                if received >= PACKET:
                    received = 0
                    limit.reschedule(loop.time() + timeout)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise TransientError(f"only {counted(received, 'byte')} came in {timeout} s") from error


def _md5_of(headers: Mapping[str, str]) -> str:
    """Return the MD5 of an object: its ETag, if it was put whole and is not encrypted with a key of KMS or the client.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    if headers.get("x-amz-server-side-encryption", "").startswith("aws:kms"):
        return ""
    tag = headers.get("ETag", "").strip('"').lower()
    return tag if re.fullmatch(r"[0-9a-f]{32}", tag) else ""


async def _refuse(answer: Any, url: str, address: Address | None) -> None:
    """Raise the error of a status other than 200 and 206."""
    text = (await answer.content.read(4096)).decode("utf-8", "replace")
    fields = {
        name: found[1]
        for name in ("Code", "Message", "Region")
        if (found := re.search(rf"<{name}>([^<]*)</{name}>", text))
    }
    code = fields.get("Code", answer.reason or "")
    reason = " ".join(f"HTTP {answer.status} {code}: {fields.get('Message', '')}".rstrip(": ").split())
    region = answer.headers.get("x-amz-bucket-region") or fields.get("Region")
    if address is not None and region and region != address.region:
        await asyncio.to_thread(address.move, region)
        raise TransientError(f"the bucket is in region {region}")
    if answer.status in (404, 410):
        raise FileNotFoundError("The specified bucket does not exist" if code == "NoSuchBucket" else url)
    if 400 <= answer.status < 500 and answer.status not in (408, 429):
        raise PermissionError(reason)  # ExpiredToken is a 400: renewable credentials have been renewed before
    raise TransientError(reason)
