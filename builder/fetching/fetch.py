"""Concurrent reads with retries. A missing or refused object is an answer; a read that keeps failing is an error."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from builder.fetching.traffic import PROCESS, Meter
from shards.common.errors import StorageError
from shards.storage.explain import explain, is_missing_bucket
from shards.storage.location import Location
from shards.storage.reads import Description, Read, ReadStatistics, describe_many, read_many
from shards.storage.store_errors import ReplacedError, TooLargeError, WrongBytesError

IN_FLIGHT = 32  # concurrent requests
OBJECT_BYTES = 256 << 20  # the largest image or record: an image of Open Images has about half a megabyte
FILE_BYTES = 8 << 30  # the largest file that is read whole: the instances of COCO's train split have 450 MB

# Error codes of wrong or expired credentials: every request would be refused, whatever the object.
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
# https://learn.microsoft.com/en-us/rest/api/storageservices/common-rest-api-error-codes
_CREDENTIAL_ERRORS = (
    "ExpiredToken",
    "InvalidToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
    "AuthenticationFailed",
    "AuthorizationFailure",
    "AuthenticationRequired",
)
_CONFIGURATION_ERRORS = ("NoCredentialsError", "InvalidRegionError")  # of botocore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """A read of an object (`end` is None) or of its bytes `start` to `end`; see `shards.storage.reads.Read`."""

    location: Location
    start: int = 0
    end: int | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A permanent negative answer: `missing`, `refused`, `too-large`, or `undecodable` (never matched its checksum)."""

    reason: str


def fetch(requests: Sequence[Request], meter: Meter = PROCESS, largest: int | None = None) -> list[bytes | Refusal]:
    """Read concurrently and return the answers in the order of the requests.

    Timeouts, server errors, broken connections and bytes that do not match their checksum are retried with back-off
    (`shards.storage.reads`). StorageError if a read fails at every attempt, or cannot succeed (no such bucket, no
    credentials). `largest` is the limit for whole objects, in bytes, by default `OBJECT_BYTES`.
    """
    statistics = ReadStatistics()
    largest = largest or OBJECT_BYTES
    reads = [Read(r.location, r.start, r.end, largest if r.end is None else None, r.etag) for r in requests]
    answers = read_many(reads, in_flight=IN_FLIGHT, statistics=statistics)
    meter.count(statistics.requests, statistics.nbytes)
    return [_checked(request, answer) for request, answer in zip(requests, answers, strict=True)]


def fetch_one(request: Request) -> bytes:
    """Read an object of up to `FILE_BYTES`; StorageError if it is missing, refused, too large or damaged."""
    return _existing(request.location, fetch([request], largest=FILE_BYTES)[0])


def describe(locations: Sequence[Location]) -> list[Description | Refusal]:
    """Request size, ETag and time of change of objects concurrently, in the order of `locations`; raises as `fetch`."""
    statistics = ReadStatistics()
    answers = describe_many(locations, in_flight=IN_FLIGHT, statistics=statistics)
    PROCESS.count(statistics.requests, statistics.nbytes)
    return [_answer_or_refusal(location.url, answer) for location, answer in zip(locations, answers, strict=True)]


@dataclass
class Inventory:
    """Descriptions of objects, each requested once and then remembered. May be shared by threads."""

    _known: dict[str, Description | Refusal] = field(default_factory=dict)

    def load(self, locations: Sequence[Location]) -> None:
        """Request all descriptions that are not known yet, as `describe`; missing objects are remembered as well."""
        unknown = [location for location in locations if location.url not in self._known]
        for location, answer in zip(unknown, describe(unknown), strict=True):
            self._known[location.url] = answer

    def of(self, location: Location) -> Description:
        """Return the description of an object; StorageError if it is missing or refused, or as in `fetch`."""
        self.load([location])
        return _existing(location, self._known[location.url])


class RangeFile(io.RawIOBase):
    """One version of a remote object as a seekable binary file: each read is a range request with retries.

    The part of `nbytes` bytes from `start` on (counted from the end if negative) is read at once and kept. StorageError
    if the object's length is unknown, it cannot be read, or was replaced.
    """

    def __init__(self, location: Location, description: Description, start: int, nbytes: int) -> None:
        super().__init__()
        self.location, self.description = location, description
        self.length = length_of(location, description)
        self._kept_start = min(start, self.length) if start >= 0 else max(0, self.length + start)
        self._position = 0
        self.kept = self._fetch(self._kept_start, min(self._kept_start + nbytes, self.length))

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position without reading anything."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError(f"{self.location}: seek to {base + offset}, before the start")  # as a local file does
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or as much of it as the object has from here."""
        done = 0
        while done < len(buffer) and self._position < self.length:
            data = self._read_some(self._position, min(self._position + len(buffer) - done, self.length))
            buffer[done : done + len(data)] = data
            done += len(data)
            self._position += len(data)
        return done

    def _read_some(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`, or up to where the kept part begins or ends."""
        offset = start - self._kept_start
        if 0 <= offset < len(self.kept):
            return self.kept[offset : end - self._kept_start]
        return self._fetch(start, min(end, self._kept_start) if offset < 0 else end)

    def _fetch(self, start: int, end: int) -> bytes:
        return fetch_one(Request(self.location, start, end, self.description.etag))

    def check_unchanged(self) -> None:
        """Raise StorageError if the object was replaced; reads of an object with an ETag have checked it already."""
        if not self.description.etag and Inventory().of(self.location) != self.description:
            raise StorageError(_replaced(self.location.url))


def length_of(location: Location, description: Description) -> int:
    """Return an object's length in bytes; a StorageError if the store does not report it."""
    if description.size is None:
        raise StorageError(f"{location}: the server does not report the object's length, which range reads need")
    return description.size


def _checked(request: Request, answer: bytes | Exception) -> bytes | Refusal:
    data = _answer_or_refusal(request.location.url, answer)
    if not isinstance(data, Refusal) and request.end is not None and len(data) != request.end - request.start:
        asked, found = request.end - request.start, len(data)
        hint = "the server seems to ignore byte ranges, which are needed" if found > asked else "is it truncated?"
        raise StorageError(f"{request.location}: expected {asked} bytes from byte {request.start}, got {found}: {hint}")
    return data


def _answer_or_refusal(url: str, answer: T | Exception) -> T | Refusal:
    """Return the answer, or the refusal that an error stands for; raise other errors."""
    if not isinstance(answer, Exception):
        return answer
    if isinstance(answer, TooLargeError):
        return Refusal("too-large")
    if isinstance(answer, WrongBytesError):
        return Refusal("undecodable")
    if isinstance(answer, ReplacedError):
        raise StorageError(_replaced(url)) from answer
    message = explain(answer, url)
    if message is None:
        raise answer
    if isinstance(answer, FileNotFoundError) and not is_missing_bucket(answer):
        return Refusal("missing")
    wrong_credentials = any(code in str(answer) for code in _CREDENTIAL_ERRORS)
    if isinstance(answer, PermissionError) and not wrong_credentials:
        return Refusal("refused")
    # Not EndpointConnectionError: botocore uses that name for a connection that was reset as well.
    permanent = isinstance(answer, PermissionError) or type(answer).__name__ in _CONFIGURATION_ERRORS
    if not permanent and not is_missing_bucket(answer):
        message += " (after several attempts)"
    raise StorageError(message, permanent=permanent) from answer


def _existing(location: Location, answer: T | Refusal) -> T:
    if not isinstance(answer, Refusal):
        return answer
    text = {
        "missing": "there is no such object: check the address (--images, --annotations)",
        "refused": "access was refused: check the credentials, or try --anonymous",
        "too-large": f"has more than {FILE_BYTES >> 20} MiB, the limit: check the address, or split the file",
        "undecodable": "its bytes did not match the store's checksum, twice: run the command again, or store it again",
    }[answer.reason]
    raise StorageError(f"{location}: {text}", missing=answer.reason == "missing", permanent=True)


def _replaced(url: str) -> str:
    return f"{url}: was replaced while it was being read: run the same command again"
