"""Many reads of objects and byte ranges at once, over S3, http(s), and whatever else fsspec knows.

S3 and http are read by plain GETs over aiohttp, signed by botocore's own signer for S3. Small ranges cost a quarter of
the processor time of the same requests through s3fs (`benchmarks/reads.py`), which on a few cores decides how fast they
can be read; and it keeps what has arrived of a body that breaks, so that the next request continues where it
broke. An ETag binds the parts of one object together. Every other file system is read through fsspec, and asked again
for the whole of a range where that fails.

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

ATTEMPTS = 5  # of a request that brings next to nothing; one that brings a packet starts the count anew
BACK_OFF_S = 0.2  # before the second attempt, doubled each time
# Bytes. A line that works brings whole packets (1448 bytes over Ethernet), be it ever so slow or shared; less than one
# within the read timeout is a server or proxy in trouble, and what goes on like that would take hours for a range.
PACKET = 1024
SLOWEST_READ = 2**14  # bytes a second below which a range of another file system than S3 and http is given up
IN_FLIGHT = 32
HTTP = ("http", "https")
REMOTE = (*HTTP, "s3", "s3a")  # what is read here by plain GETs

Bytes = bytes | bytearray  # what is read; it is not copied to become immutable

T = TypeVar("T")
Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class Read:
    """A whole object (`end` is None), or its bytes `start` to `end` (exclusive).

    A whole object of S3 is checked against its ETag where that is an MD5. `largest`: a longer object is not read.
    `etag`: read only while the object has this one (S3 and http; a weak one, W/"...", binds nothing).
    """

    location: Location
    start: int = 0
    end: int | None = None
    largest: int | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Description:
    """What a store tells of an object.

    Attributes:
        size: in bytes; None where it is not told.
        etag: as told, with its quotes; "" where none is told.
        changed: when it was last changed, in whatever form that is told; "" where it is not.
    """

    size: int | None
    etag: str = ""
    changed: str = ""


@dataclass
class ReadStatistics:
    """What was done so far: requests sent, bytes received, requests that had to be repeated or continued, and why the
    last of these had to."""

    requests: int = 0
    nbytes: int = 0
    retries: int = 0
    trouble: str = ""


class TransientError(OSError):
    """The server's answer may be another next time: 5xx, 429, 408, or a body that ended early."""


class WrongBytesError(TransientError):
    """What came is not what the store's checksum says."""


class ReplacedError(OSError):
    """The object no longer has the ETag that the read is bound to."""


class TooLargeError(OSError):
    """The object is longer than the read allows."""


# What another attempt will not mend.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, TooLargeError, ReplacedError)


def read_many(
    reads: Sequence[Read], *, in_flight: int = IN_FLIGHT, statistics: ReadStatistics | None = None
) -> list[bytes | Exception]:
    """Read everything asked for, concurrently, in the order asked.

    What may pass (timeouts, 5xx, broken connections, short answers) is tried again with back-off, and continued where
    it broke (S3 and http). A read that fails for good is its exception: FileNotFoundError, PermissionError, or what
    `shards.storage.explain` explains. A short answer of an object that really ends there is returned as it is.
    """
    statistics = statistics or ReadStatistics()
    return _run(_all(lambda read: _read_bytes(read, statistics), reads, in_flight))


def describe_many(
    locations: Sequence[Location], *, in_flight: int = IN_FLIGHT, statistics: ReadStatistics | None = None
) -> list[Description | Exception]:
    """What the store tells of objects, concurrently, in the order asked; what cannot be had is an exception.

    S3 and http are asked for an object's first byte: the answer tells as much as a HEAD does, and whoever may read an
    object may ask so, by a signed URL too.
    """
    statistics = statistics or ReadStatistics()
    return _run(_all(lambda location: _describe(location, statistics), locations, in_flight))


def start_read(read: Read, *, statistics: ReadStatistics | None = None) -> Future[Bytes]:
    """Begin a read in the background; the future's result or exception is that of `read_many`."""
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
    """Read through fsspec. Only what a file system does asynchronously can be given up: a thread cannot be ended."""
    fs, limit = read.location.fs, {}
    if fs.async_impl and read.end is not None:
        limit["timeout"] = storage.READ_TIMEOUT_S + (read.end - read.start) / SLOWEST_READ
    try:
        data = await asyncio.to_thread(fs.cat_file, read.location.path, start=read.start, end=read.end, **limit)
    except TimeoutError as error:
        told = str(error) or (f"no answer came in {limit['timeout']:.0f} s" if limit else "it took too long")
        raise TransientError(told) from error
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
    """Get an object or range by http; what has arrived of a body that breaks stays, and the rest is asked for."""
    address, key = None, ""
    if read.location.protocol not in HTTP:
        bucket, _, key = read.location.url.partition("://")[2].partition("/")
        address, key = await address_of(bucket, read.location.anonymous), quote(key, safe="/~")
    body, attempts = _Body(read, statistics), _Attempts(statistics)
    while True:
        before = len(body.data)
        # Anew each time: an answer may have told that the bucket lies in another region.
        url = read.location.url if address is None else f"{address.base}/{key}"
        try:
            statistics.requests += 1
            await _get_once(body, url, address)
            if body.is_right(address):
                return body
            raise WrongBytesError("the bytes do not have the MD5 that the store tells (ETag)")
        except (OSError, aiohttp_module().ClientError) as error:
            await attempts.failed(error, len(body.data) - before)


@dataclass
class _Attempts:
    """How often one read is tried, and when again."""

    statistics: ReadStatistics
    failures: int = 0  # in a row

    async def failed(self, error: Exception, nbytes: int) -> None:
        """Wait for the next attempt, after one that brought so many bytes; raises `error` where there is none."""
        if isinstance(error, FINAL):
            raise error
        self.failures = 0 if nbytes >= PACKET else self.failures + 1
        if self.failures >= ATTEMPTS:
            raise error
        self.statistics.retries += 1
        self.statistics.trouble = " ".join(str(error).split()) or type(error).__name__
        # Jitter keeps many processes from asking an overloaded server all at once again.
        await asyncio.sleep(BACK_OFF_S * 2**self.failures * random.uniform(0.5, 1.5))


@dataclass
class _Body:
    """What has arrived of one read."""

    read: Read
    statistics: ReadStatistics  # counts all bytes, also those that are dropped
    data: bytearray = field(default_factory=bytearray)
    etag: str = ""
    length: int | None = None  # of the whole object
    changed: str = ""
    md5: str = ""  # that the store tells of the whole object; "" where it does not
    wrong: str = ""  # the MD5 of what came before, when that was not it

    def is_right(self, address: Address | None) -> bool:
        """Whether the bytes are the object's, as far as can be told; if not, they are dropped."""
        if not self.md5 or address is None or self.read.end is not None or self.read.start:
            return True
        found = hashlib.md5(self.data, usedforsecurity=False).hexdigest()
        if found == self.md5:
            address.tells_md5 = True
            return True
        if found == self.wrong and not address.tells_md5:
            return True  # the same twice: this store's ETag is another checksum than was thought
        self.wrong = found
        self.data.clear()
        return False

    @property
    def missing(self) -> int:
        """Bytes that the object has and that have not come, as far as its length is told; not above 0 if all have."""
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
            headers["If-Match"] = bound  # the rest of another object would be worse than an error
        return headers

    def take_headers(self, answer: Any) -> None:
        """What the head of an answer tells."""
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
            body.data.clear()  # the whole again, where its rest was asked for
        body.take_headers(answer)
        body.md5 = _md5_of(answer.headers) if address is not None else ""
        if body.read.largest is not None and (answer.content_length or 0) > body.read.largest:
            raise TooLargeError(f"{answer.content_length} bytes, the limit is {body.read.largest}")
        await _receive(answer.content, body)
    if body.missing > 0:  # though the answer was whole by itself
        raise TransientError(f"the answer ended {counted(body.missing, 'byte')} before what was asked for")


async def _receive(content: Any, body: _Body) -> None:
    """Take a body in, as long as a packet of it comes within the read timeout, however many drops come meanwhile."""
    loop, patience, came = asyncio.get_running_loop(), storage.READ_TIMEOUT_S, 0
    limit = asyncio.timeout(patience)
    try:
        async with limit:
            async for chunk in content.iter_any():
                body.data += chunk
                body.statistics.nbytes += len(chunk)
                came += len(chunk)
                if came >= PACKET:
                    came = 0
                    limit.reschedule(loop.time() + patience)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise TransientError(f"only {counted(came, 'byte')} came in {patience} s") from error


def _md5_of(headers: Mapping[str, str]) -> str:
    """The MD5 of an object that was put whole: its ETag, unless a key of KMS or of the client's encrypts it.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    if headers.get("x-amz-server-side-encryption", "").startswith("aws:kms"):
        return ""
    tag = headers.get("ETag", "").strip('"').lower()
    return tag if re.fullmatch(r"[0-9a-f]{32}", tag) else ""


async def _refuse(answer: Any, url: str, address: Address | None) -> None:
    """Raise what a status other than 200 and 206 means."""
    text = (await answer.content.read(4096)).decode("utf-8", "replace")
    told = {
        name: found[1]
        for name in ("Code", "Message", "Region")
        if (found := re.search(rf"<{name}>([^<]*)</{name}>", text))
    }
    code = told.get("Code", answer.reason or "")
    reason = " ".join(f"HTTP {answer.status} {code}: {told.get('Message', '')}".rstrip(": ").split())
    region = answer.headers.get("x-amz-bucket-region") or told.get("Region")
    if address is not None and region and region != address.region:
        await asyncio.to_thread(address.move, region)
        raise TransientError(f"the bucket is in region {region}")
    if answer.status in (404, 410):
        raise FileNotFoundError("The specified bucket does not exist" if code == "NoSuchBucket" else url)
    if 400 <= answer.status < 500 and answer.status not in (408, 429):
        raise PermissionError(reason)  # ExpiredToken is a 400: credentials that can renew themselves have done so
    raise TransientError(reason)
