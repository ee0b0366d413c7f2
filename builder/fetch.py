"""Many reads at once, with retries: what is missing or refused is an answer, what stays broken is an error."""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.errors import StorageError
from shards.storage import Location, explain, is_missing_bucket, storage_errors

ATTEMPTS = 4
BACK_OFF_S = 0.5  # before the second attempt; doubled each time
IN_FLIGHT = 32  # requests at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A whole object (`end` is None), or its bytes `start` to `end` (exclusive)."""

    location: Location
    start: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The store answered, and will answer the same again: `reason` is `missing` or `refused`."""

    reason: str


def fetch(requests: Sequence[Request]) -> list[bytes | Refusal]:
    """Read everything asked for, concurrently where the file system can, in the order asked.

    Timeouts, server errors, broken connections and short answers are tried again with back-off. All requests must be
    of one file system.

    Raises:
        StorageError: a read still failed after `ATTEMPTS`, or it cannot succeed (no such bucket, no credentials).
    """
    results: list[bytes | Refusal] = [Refusal("missing")] * len(requests)
    pending = list(range(len(requests)))
    for attempt in range(1, ATTEMPTS + 1):
        failed: list[int] = []
        reason = ""
        for index, answer in zip(pending, _read_once([requests[i] for i in pending]), strict=True):
            request = requests[index]
            if isinstance(answer, Exception):
                refusal = refusal_of(answer, request.location.url)
                if refusal is not None:
                    results[index] = refusal
                    continue
                reason = explain(answer, request.location.url) or repr(answer)
            elif request.end is None or len(answer) == request.end - request.start:
                results[index] = answer
                continue
            else:
                reason = _wrong_length(request, len(answer))
            failed.append(index)
        pending = failed
        if not pending:
            return results
        if attempt < ATTEMPTS:
            logger.debug("%s; attempt %d of %d, again soon", reason, attempt, ATTEMPTS)
            # Jitter keeps many workers from coming back at the same moment; it decides no byte of the result.
            time.sleep(BACK_OFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise StorageError(f"{reason} (after {ATTEMPTS} attempts)")


def fetch_one(request: Request) -> bytes:
    """Read one thing that must be there.

    Raises:
        StorageError: it is missing, refused, or still failed after `ATTEMPTS`.
    """
    [answer] = fetch([request])
    if isinstance(answer, Refusal):
        url = request.location.url
        if answer.reason == "missing":
            raise StorageError(f"{url}: there is no such object: check the address (--images, --annotations)")
        raise StorageError(f"{url}: access was refused: check the credentials, or try --anonymous")
    return answer


def refusal_of(error: Exception, url: str) -> Refusal | None:
    """What a permanent answer of the store means; None for an error that may pass.

    Raises:
        StorageError: the error concerns not the object but the whole store, and waiting does not help.
    """
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        if is_missing_bucket(error):
            raise StorageError(explain(error, url) or f"{url}: the bucket does not exist") from error
        return Refusal("missing")
    if isinstance(error, PermissionError) or status in (401, 403):
        return Refusal("refused")
    message = explain(error, url)
    if message is None:
        raise error
    if type(error).__name__ in ("NoCredentialsError", "EndpointConnectionError", "InvalidRegionError"):
        raise StorageError(message) from error  # botocore has already tried the endpoint several times
    return None


def _read_once(requests: Sequence[Request]) -> list[bytes | Exception]:
    if not requests:
        return []
    fs = requests[0].location.fs
    paths = [request.location.path for request in requests]
    whole = all(request.end is None for request in requests)
    starts: Any = None if whole else [request.start for request in requests]
    ends: Any = None if whole else [request.end for request in requests]
    options = {"batch_size": IN_FLIGHT} if fs.async_impl else {}
    with storage_errors(requests[0].location.url):
        return list(fs.cat_ranges(paths, starts, ends, on_error="return", **options))


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
        self.length = location.size()
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
