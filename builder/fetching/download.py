"""Download of a large table: several ranges at once, in order, with a progress bar, and resumed after a kill."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import Any

from builder.fetching.fetch import RangeFile
from builder.fetching.partial_file import PartialFile
from shards.commands.progress import Progress
from shards.common.errors import StorageError, UserError
from shards.storage.location import Location
from shards.storage.reads import Description

HEAD_BYTES = 1 << 20  # read first, by itself; most tables are no longer
RANGE_BYTES = 4 << 20
RANGES_AHEAD = 8  # in flight, or waiting for their turn: 32 MiB of memory

logger = logging.getLogger(__name__)


class Download(RangeFile):
    """One version of a remote object, as a binary file that is read once, from start to end, by one thread at a time.

    Its first `HEAD_BYTES` are read at once. If there are more, `open_partial` opens the file for what has arrived. Used
    as a context manager: the file stays for a process that tries again, unless the contents turn out to be wrong (a
    UserError that is no StorageError).
    """

    def __init__(
        self,
        location: Location,
        description: Description,
        open_partial: Callable[[], PartialFile | None] = lambda: None,
    ) -> None:
        super().__init__(location, description, 0, HEAD_BYTES)
        self._left = memoryview(self.kept)  # of the current piece
        self._partial = open_partial() if len(self.kept) < self.length else None
        self._ahead: deque[Future[bytes]] = deque()
        self._closing = False
        self._pieces = self._arrive()
        self._lock = threading.Lock()

    def seekable(self) -> bool:
        """Return False."""
        return False

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or as much of it as the object has from here."""
        done = 0
        with self._lock:
            while done < len(buffer):
                self._left = self._left or memoryview(next(self._pieces, b""))
                if not self._left:
                    break
                count = min(len(self._left), len(buffer) - done)
                buffer[done : done + count] = self._left[:count]
                self._left = self._left[count:]
                done += count
        return done

    def _arrive(self) -> Generator[bytes, None, None]:
        """Yield what follows the head, in order: first what an interrupted download has kept, then ranges."""
        position, started = len(self.kept), time.monotonic()
        if position == self.length:
            return
        name = self.location.url.partition("?")[0].rsplit("/", 1)[-1]
        with Progress(name, self.length / 1e6, "MB", logger.info) as progress:
            progress.advance(position / 1e6)
            for data in self._partial.pieces(position) if self._partial else ():
                position += len(data)
                progress.advance(len(data) / 1e6)
                yield data
            if position > len(self.kept):
                done, total = position / 1e6, self.length / 1e6
                logger.info("%s: resuming a download: %.1f of %.1f MB are here", self.location, done, total)
            for data in self._ranges(position):
                if self._partial is not None:
                    self._partial.add(position, data)
                position += len(data)
                progress.advance(len(data) / 1e6)
                yield data
        if self.length > RANGE_BYTES:
            megabytes, seconds = self.length / 1e6, time.monotonic() - started
            logger.info("%s: %.1f MB in %.0f s", self.location, megabytes, seconds)

    def _ranges(self, start: int) -> Iterator[bytes]:
        """Yield the object from byte `start` on; at most `RANGES_AHEAD` ranges are requested before they are needed."""
        requested = map(self._request, range(start, self.length, RANGE_BYTES))
        self._ahead.extend(islice(requested, RANGES_AHEAD))
        while self._ahead:
            if self._closing:  # by another thread, which may not have seen the newest requests
                self._cancel()
            data = self._ahead[0].result()
            self._ahead.popleft()
            self._ahead.extend(islice(requested, 1))
            yield data

    def _cancel(self) -> None:
        for future in list(self._ahead):
            future.cancel()

    def _request(self, start: int) -> Future[bytes]:
        """Fetch a range in a thread of its own, whose future can be cancelled while it runs: `close` need not wait."""
        future = Future[bytes]()

        def fetch() -> None:
            with suppress(InvalidStateError):  # the file was closed meanwhile
                try:
                    future.set_result(self._fetch(start, min(start + RANGE_BYTES, self.length)))
                except Exception as error:
                    future.set_exception(error)

        threading.Thread(target=fetch, name="download", daemon=True).start()
        return future

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; if its contents are wrong, forget what was kept."""
        self.close(keep=isinstance(error, StorageError) or not isinstance(error, UserError))

    def close(self, *, keep: bool = True) -> None:
        """Close the file without waiting for ranges that are on their way."""
        self._closing = True
        self._cancel()
        with self._lock:
            self._pieces.close()
            if self._partial is not None:
                self._partial.close(keep=keep)
        super().close()
