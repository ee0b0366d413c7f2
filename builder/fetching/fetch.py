"""Many reads at once, with retries: what is missing or refused is an answer, what stays broken is an error."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from builder.fetching.traffic import PROCESS, Meter
from shards.common.errors import StorageError
from shards.storage.explain import explain, is_missing_bucket
from shards.storage.location import Location
from shards.storage.ranges import (
    Description,
    Read,
    ReadStatistics,
    ReplacedError,
    TooLargeError,
    WrongBytesError,
    describe_many,
    read_many,
)

IN_FLIGHT = 32  # requests at a time
OBJECT_BYTES = 256 << 20  # the largest object that is read whole: five hundred times an image of Open Images

# S3's codes for credentials that are wrong or over: every object would be refused, and none is to blame.
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_OF_THE_ACCOUNT = (
    "ExpiredToken",
    "InvalidToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """A whole object (`end` is None), or its bytes `start` to `end` (exclusive); see `shards.storage.ranges.Read`."""

    location: Location
    start: int = 0
    end: int | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The store answered, and will answer the same again.

    `reason` is `missing`, `refused`, `too-large`, or `undecodable`: at no attempt did the bytes match their checksum.
    """

    reason: str


def fetch(requests: Sequence[Request], meter: Meter = PROCESS) -> list[bytes | Refusal]:
    """Read everything asked for, concurrently, in the order asked; `meter` counts it.

    Timeouts, server errors, broken connections and bytes that do not match a checksum are tried again with back-off
    (`shards.storage.ranges`).

    Raises:
        StorageError: a read still failed after all attempts, or it cannot succeed (no such bucket, no credentials).
    """
    statistics = ReadStatistics()
    reads = [Read(r.location, r.start, r.end, OBJECT_BYTES if r.end is None else None, r.etag) for r in requests]
    answers = read_many(reads, in_flight=IN_FLIGHT, statistics=statistics)
    meter.count(statistics.requests, statistics.nbytes)
    return [_judged(request, answer) for request, answer in zip(requests, answers, strict=True)]


def _judged(request: Request, answer: bytes | Exception) -> bytes | Refusal:
    judged = _no_failure(request.location, answer)
    if not isinstance(judged, Refusal) and request.end is not None and len(judged) != request.end - request.start:
        raise StorageError(_wrong_length(request, len(judged)))
    return judged


def _no_failure(location: Location, answer: T | Exception) -> T | Refusal:
    if not isinstance(answer, Exception):
        return answer
    refusal = refusal_of(answer, location.url)
    if refusal is None:
        reason = explain(answer, location.url) or repr(answer)
        raise StorageError(f"{reason} (after several attempts)") from answer
    return refusal


def fetch_all(requests: Sequence[Request]) -> list[bytes]:
    """Read things that must be there.

    Raises:
        StorageError: one is missing, refused, or still failed after all attempts.
    """
    contents = []
    for request, answer in zip(requests, fetch(requests), strict=True):
        if isinstance(answer, Refusal):
            raise _refused(answer, request.location.url)
        contents.append(answer)
    return contents


def fetch_one(request: Request) -> bytes:
    """Read one thing that must be there; see `fetch_all`."""
    return fetch_all([request])[0]


def describe(locations: Sequence[Location]) -> list[Description | Refusal]:
    """What the store tells of objects, concurrently, in the order asked.

    Raises:
        StorageError: a question still failed after all attempts, or cannot succeed (no such bucket, no credentials).
    """
    statistics = ReadStatistics()
    answers = describe_many(locations, in_flight=IN_FLIGHT, statistics=statistics)
    PROCESS.count(statistics.requests, statistics.nbytes)
    return [_no_failure(location, answer) for location, answer in zip(locations, answers, strict=True)]


@dataclass
class Inventory:
    """What the store tells of objects: asked once, and from then on remembered. May be shared by threads."""

    _known: dict[str, Description | Refusal] = field(default_factory=dict)

    def ask(self, locations: Sequence[Location]) -> None:
        """Ask for all that is not known yet, at once; that there is no such object is an answer too.

        Raises:
            StorageError: the store still failed after all attempts.
        """
        unknown = [location for location in locations if location.url not in self._known]
        for location, answer in zip(unknown, describe(unknown), strict=True):
            self._known[location.url] = answer

    def of(self, location: Location) -> Description:
        """What is told of an object that must be there.

        Raises:
            StorageError: it is missing, refused, or the store still failed after all attempts.
        """
        self.ask([location])
        found = self._known[location.url]
        if isinstance(found, Refusal):
            raise _refused(found, location.url)
        return found


def refusal_of(error: Exception, url: str) -> Refusal | None:
    """What a permanent answer of the store means; None for an error that may pass.

    Raises:
        StorageError: the error concerns not the object but the whole store, and waiting does not help.
    """
    status = getattr(error, "status", None)
    if isinstance(error, TooLargeError):
        return Refusal("too-large")
    if isinstance(error, WrongBytesError):
        return Refusal("undecodable")
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        if is_missing_bucket(error):
            raise StorageError(explain(error, url) or f"{url}: the bucket does not exist") from error
        return Refusal("missing")
    if isinstance(error, PermissionError) and any(code in str(error) for code in _OF_THE_ACCOUNT):
        raise StorageError(explain(error, url) or repr(error), permanent=True) from error
    if isinstance(error, PermissionError) or status in (401, 403):
        return Refusal("refused")
    if isinstance(error, ReplacedError):
        raise StorageError(_replaced(url)) from error
    message = explain(error, url)
    if message is None:
        raise error
    # Not EndpointConnectionError: that is also botocore's name for a connection that was reset.
    if type(error).__name__ in ("NoCredentialsError", "InvalidRegionError"):
        raise StorageError(message, permanent=True) from error
    return None


def _refused(refusal: Refusal, url: str) -> StorageError:
    if refusal.reason == "missing":
        text = f"{url}: there is no such object: check the address (--images, --annotations)"
        return StorageError(text, missing=True)
    return StorageError(f"{url}: access was refused: check the credentials, or try --anonymous", permanent=True)


def _replaced(url: str) -> str:
    return f"{url}: was replaced while it was being read: give the same command again"


def _wrong_length(request: Request, found: int) -> str:
    assert request.end is not None
    asked = request.end - request.start
    hint = "the server seems to ignore byte ranges, which are needed" if found > asked else "is it truncated?"
    return f"{request.location}: asked for {asked} bytes from {request.start} on, got {found}: {hint}"


class RangeFile(io.RawIOBase):
    """A remote object as a seekable binary file: every read is one range request, with `fetch`'s retries.

    Args:
        location: the object.
        told: what its store tells of it; reads are of that version of the object, or fail.
        parts: bytes of it that are at hand already, by where they start.

    Raises:
        StorageError: the object's length is not told; when reading, that it cannot be read or was replaced.
    """

    def __init__(self, location: Location, told: Description, parts: Mapping[int, bytes] | None = None) -> None:
        super().__init__()
        self.location, self.told = location, told
        self.length = length_of(location, told)
        self._parts = dict(parts or {})
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError(f"{self.location}: seek to {base + offset}, before the start")  # as a local file does
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        done = 0
        while done < len(buffer) and self._position < self.length:
            data = self._some(self._position, min(self._position + len(buffer) - done, self.length))
            buffer[done : done + len(data)] = data
            done += len(data)
            self._position += len(data)
        return done

    def _some(self, start: int, end: int) -> bytes:
        """The bytes from `start` on, up to `end` or where what is at hand begins or ends."""
        for first, data in self._parts.items():
            if first <= start < first + len(data):
                return data[start - first : end - first]
            if start < first:
                end = min(end, first)
        return fetch_one(Request(self.location, start, end, self.told.etag))

    def check_unchanged(self) -> None:
        """Reads of an object with an ETag are bound to it; any other is asked for its state once more.

        Raises:
            StorageError: it was replaced since `told` was told.
        """
        if not self.told.etag:
            again = Inventory().of(self.location)
            if again != self.told:
                raise StorageError(_replaced(self.location.url))


def length_of(location: Location, told: Description) -> int:
    """An object's length in bytes.

    Raises:
        StorageError: it is not told.
    """
    if told.size is None:
        raise StorageError(f"{location}: the server does not tell the object's length, which range reads need")
    return told.size
