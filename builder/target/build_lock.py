"""The lock of a root: one build at a time, and a build that died does not keep it.

The lock is an object that states its holder. It is created by a conditional put, which on a disk is an exclusive
create, and renewed every `BEAT_S`. It is stale if it was not renewed for `STALE_S`, or at once if its holder died on
this machine: each build locks a file in the temporary folder, which the system unlocks when the process ends. A stale
lock is overwritten, and so is any lock on a store without conditional puts: there the last writer holds it, and a
holder that lost its lock stops after its next heartbeat.
"""

import fcntl
import json
import logging
import math
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Self

from builder.fetching.fetch import Refusal, Request, fetch
from shards.common.errors import StorageError, UserError
from shards.common.text import printable
from shards.format.sample import canonical_json
from shards.storage import retry
from shards.storage.location import Location

LOCK_FILE = ".build.lock"
BEAT_S = 60.0
STALE_S = 600.0  # ten missed beats; clocks of machines that share a root may differ by less than this
SETTLE_S = 2.0  # longer than a store takes from a read to a put

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The build that holds a lock: a random token, its description, and the time of its last heartbeat, since 1970."""

    token: str
    build: str
    beat: float

    @property
    def mark(self) -> str:
        """Path of the file that the build keeps locked on its machine."""
        return f"{tempfile.gettempdir()}/maskstream-build-{self.token}"

    def has_died_here(self) -> bool:
        """Return whether the mark is on this machine, and nobody locks it."""
        with suppress(OSError), open(self.mark) as file:  # FileNotFoundError: elsewhere; BlockingIOError: it is alive
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
        return False


class BuildLock:
    """A lock of a root, held while the context manager is entered."""

    def __init__(
        self, root: Location, now: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._root, self._now, self._sleep = root, now, sleep
        started = datetime.fromtimestamp(now(), UTC).isoformat(timespec="seconds")
        build = f"process {os.getpid()} on {socket.gethostname()}, started {started}"
        self._holder = Holder(secrets.token_hex(8), build, now())
        self._lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)

    def __enter__(self) -> Self:
        """Acquire the lock; UserError if another build holds it, StorageError if the root cannot be read or written."""
        stale = refuse_if_held(self._root, self._now)
        if stale is not None or not retry.create(self._root / LOCK_FILE, self._content()):
            self._overwrite(stale)
        with suppress(OSError):  # without a mark, the lock expires if this process dies
            self._marked = open(self._holder.mark, "x")  # open as long as the process lives
            fcntl.flock(self._marked, fcntl.LOCK_EX)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the lock unless another build holds it."""
        self._released.set()
        self._thread.join()
        try:
            if self._is_mine():
                retry.delete(self._root / LOCK_FILE)
        except StorageError as error:  # must not hide how the build ended
            logger.warning("the lock could not be removed: %s", error)
        with suppress(OSError):
            os.unlink(self._holder.mark)

    def check(self) -> None:
        """Raise UserError if another build has taken the lock over."""
        if self._lost:
            why = f"another build took over because this one did not respond for {STALE_S:.0f} s"
            raise UserError(f"{self._root}: {why}: let the other one finish")

    def beat(self) -> None:
        """Renew the lock, or notice that another build has taken it over."""
        try:
            self._lost = not self._is_mine()
            if not self._lost:
                (self._root / LOCK_FILE).write(self._content())
        except StorageError as error:
            logger.debug("the lock could not be renewed: %s", error)  # one of ten beats

    def _renew(self) -> None:
        while not self._lost and not self._released.wait(BEAT_S):
            self.beat()

    def _overwrite(self, stale: Holder | None) -> None:
        if stale is not None and stale.token:
            logger.info("taking over the lock of %s", stale.build)
        else:
            self._sleep(SETTLE_S)  # another build may have created the lock and not yet written its content
            if not self._is_mine():
                refuse_if_held(self._root, self._now)
        retry.write(self._root / LOCK_FILE, self._content())
        self._sleep(SETTLE_S)  # every build that read the lock before this write has written by now
        if not self._is_mine():
            raise UserError(f"{self._root}: another build started at the same moment: run the command again")

    def _is_mine(self) -> bool:
        """Return whether no other build holds the lock."""
        found = read_lock(self._root)
        return found is None or found.token == self._holder.token

    def _content(self) -> bytes:
        return canonical_json(asdict(replace(self._holder, beat=self._now())))


def refuse_if_held(root: Location, now: Callable[[], float] = time.time) -> Holder | None:
    """Return the holder of a stale lock, or None without a lock; UserError if a running build holds the lock."""
    found = read_lock(root)
    # A beat far in the future is no beat: another clock was wrong, or the lock was not written by a build.
    if found is None or abs(now() - found.beat) > STALE_S or found.has_died_here():
        return found
    raise UserError(
        f"{root}: another build is at work there: {found.build}: wait for it, or choose another --out (should it be "
        f"dead, its lock is stale {STALE_S / 60:.0f} minutes after its last heartbeat; to discard the lock now, remove "
        f"{root / LOCK_FILE})"
    )


def read_lock(root: Location) -> Holder | None:
    """Return who holds the lock, or None without a lock."""
    [answer] = fetch([Request(root / LOCK_FILE)])
    if isinstance(answer, Refusal):
        return None
    with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        value = json.loads(answer)
        token, build, beat = value["token"], value["build"], value["beat"]
        if re.fullmatch("[0-9A-Za-z]{1,64}", token) and type(build) is str and math.isfinite(beat):
            return Holder(token, printable(build)[:200], float(beat))
    return Holder("", "an unknown process", 0.0)  # damaged, or killed while it created the lock
