"""Many reads at once, with retries: what is missing or refused is an answer, what stays broken is an error."""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from builder.traffic import PROCESS, Meter
from shards.errors import StorageError
from shards.ranges import Read, ReadStatistics, TooLargeError, WrongBytesError, read_many
from shards.storage import Location, explain, is_missing_bucket

ATTEMPTS = 4
BACK_OFF_S = 0.5  # before the second attempt; doubled each time
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A whole object (`end` is None), or its bytes `start` to `end` (exclusive)."""

    location: Location
    start: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The store answered, and will answer the same again.

    `reason` is `missing`, `refused`, `too-large`, or `undecodable`: at no attempt did the bytes match their checksum.
    """

    reason: str


def fetch(requests: Sequence[Request], meter: Meter = PROCESS) -> list[bytes | Refusal]:
    """Read everything asked for, concurrently, in the order asked; `meter` counts it.

    Timeouts, server errors, broken connections and bytes that do not match a checksum are tried again with back-off
    (`shards.ranges`).

    Raises:
        StorageError: a read still failed after all attempts, or it cannot succeed (no such bucket, no credentials).
    """
    statistics = ReadStatistics()
    reads = [Read(r.location, r.start, r.end, OBJECT_BYTES if r.end is None else None) for r in requests]
    answers = read_many(reads, in_flight=IN_FLIGHT, statistics=statistics)
    meter.count(statistics.requests, statistics.nbytes)
    return [_judged(request, answer) for request, answer in zip(requests, answers, strict=True)]


def _judged(request: Request, answer: bytes | Exception) -> bytes | Refusal:
    if isinstance(answer, Exception):
        refusal = refusal_of(answer, request.location.url)
        if refusal is None:
            reason = explain(answer, request.location.url) or repr(answer)
            raise StorageError(f"{reason} (after several attempts)") from answer
        return refusal
    if request.end is not None and len(answer) != request.end - request.start:
        raise StorageError(_wrong_length(request, len(answer)))
    return answer


def fetch_one(request: Request) -> bytes:
    """Read one thing that must be there.

    Raises:
        StorageError: it is missing, refused, or still failed after `ATTEMPTS`.
    """
    [answer] = fetch([request])
    if isinstance(answer, Refusal):
        raise _refused(answer, request.location.url)
    return answer


def describe(location: Location) -> dict[str, Any]:
    """What the store tells of an object without sending it: its `size`, and an ETag or a time where it has them.

    Raises:
        StorageError: it is missing, refused, its size is not told, or the store still failed after `ATTEMPTS`.
    """
    reason = ""
    for attempt in range(1, ATTEMPTS + 1):
        PROCESS.count(1, 0)
        try:
            info: dict[str, Any] = location.fs.info(location.path)
        except Exception as error:
            refusal = refusal_of(error, location.url)
            if refusal is not None:
                raise _refused(refusal, location.url) from error
            reason = explain(error, location.url) or repr(error)
        else:
            if info.get("size") is None:
                raise StorageError(f"{location}: the server does not tell the object's length, which range reads need")
            return info
        if attempt < ATTEMPTS:
            _wait(reason, attempt)
    raise StorageError(f"{reason} (after {ATTEMPTS} attempts)")


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


def _wait(reason: str, attempt: int) -> None:
    logger.debug("%s; attempt %d of %d, again soon", reason, attempt, ATTEMPTS)
    # Jitter keeps many workers from coming back at the same moment; it decides no byte of the result.
    time.sleep(BACK_OFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))


def _wrong_length(request: Request, found: int) -> str:
    assert request.end is not None
    asked = request.end - request.start
    hint = "the server seems to ignore byte ranges, which are needed" if found > asked else "is it truncated?"
    return f"{request.location}: asked for {asked} bytes from {request.start} on, got {found}: {hint}"


class RangeFile(io.RawIOBase):
    """A remote object as a seekable binary file: every read is one range request, with `fetch`'s retries.

    Args:
        location: the object.
        tail: so many bytes at its end are fetched on opening and served from memory.

    Raises:
        StorageError: the object is missing or cannot be read.
    """

    def __init__(self, location: Location, *, tail: int = 0) -> None:
        super().__init__()
        self.location = location
        self.length = int(describe(location)["size"])
        self._position = 0
        self._tail_start = max(0, self.length - tail)
        self._tail = self._range(self._tail_start, self.length)

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
        start = self._position
        end = min(start + len(buffer), self.length)
        if start >= end:
            return 0
        if start >= self._tail_start:
            data = self._tail[start - self._tail_start : end - self._tail_start]
        else:
            data = self._range(start, end)
        buffer[: len(data)] = data
        self._position = start + len(data)
        return len(data)

    def _range(self, start: int, end: int) -> bytes:
        return fetch_one(Request(self.location, start, end)) if end > start else b""
