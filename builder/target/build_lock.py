"""One build a root: a lock file that says who builds, and that a dead build does not keep.

A local lock is made by an exclusive create, one on an object store by a conditional put (`If-None-Match: *`) where the
store knows it; where it does not, and when a stale lock is taken over, the last writer wins: each writes its token,
waits a moment, and goes on only if the lock still holds it. The holder renews the lock every `BEAT_S` and stops when it
finds another's token in it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from builder.fetching.fetch import Refusal, Request, fetch
from shards.common.errors import StorageError, UserError
from shards.format.sample import canonical_json
from shards.storage import retry
from shards.storage.explain import storage_errors
from shards.storage.location import Location

LOCK_FILE = ".build.lock"
BEAT_S = 60.0
STALE_S = 600.0  # ten missed beats; clocks of machines that share a root may differ by less than this
SETTLE_S = 2.0  # longer than a store takes from a read to a put

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        token: random; tells one holder from every other.
        host, pid: where it runs.
        machine: what tells apart machines (and containers) in which a pid means another process.
        born: when the process started, as its machine counts; "" where that is not told.
        started: when the build did, UTC, ISO 8601.
        beat: when the lock was renewed last, seconds since 1970.
    """

    token: str
    host: str
    pid: int
    machine: str
    born: str
    started: str
    beat: float

    def is_dead(self) -> bool:
        """Whether the holder plainly does not work any more."""
        if self.machine == _machine():
            return not _lives(self.pid, self.born)
        return time.time() - self.beat > STALE_S


class Lock:
    """A lock that is held."""

    def __init__(self, root: Location, holder: Holder) -> None:
        self._root, self._holder = root, holder
        self._lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises UserError when another build has taken the lock over."""
        if self._lost:
            raise UserError(
                f"{self._root}: another build has taken over while this one did not answer for {STALE_S:.0f} s: "
                "let it finish"
            )

    def release(self) -> None:
        """Remove the lock, if it is still ours."""
        self._released.set()
        self._thread.join()
        try:
            found = read_lock(self._root)
            if not self._lost and (found is None or _is(found, self._holder)):
                retry.delete(self._root / LOCK_FILE)
        except StorageError as error:  # the build has ended, well or not: its own word is what counts
            logger.warning("the lock could not be removed: %s", error)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                found = read_lock(self._root)
                if found is not None and not _is(found, self._holder):
                    self._lost = True
                    return
                (self._root / LOCK_FILE).write(_content(replace(self._holder, beat=time.time())))
            except StorageError as error:
                logger.debug("the lock could not be renewed: %s", error)  # one of ten beats


@contextmanager
def hold(root: Location) -> Iterator[Lock]:
    """Hold the lock of a root.

    Raises:
        UserError: another build holds it.
        StorageError: the root cannot be read or written.
    """
    lock = Lock(root, _acquire(root))
    try:
        yield lock
    finally:
        lock.release()


def refuse_if_held(root: Location) -> None:
    """Fail before any work is done where another build is at work; writes nothing.

    Raises:
        UserError: another build holds the lock.
    """
    found = read_lock(root)
    if found is not None and not found.is_dead():
        raise UserError(_refusal(root, found))


def read_lock(root: Location) -> Holder | None:
    """Who holds the lock; None for nobody, or for a lock that a build left half written when it was killed."""
    [answer] = fetch([Request(root / LOCK_FILE)])
    if isinstance(answer, Refusal):
        return None
    try:
        return Holder(**json.loads(answer))
    except (ValueError, TypeError):
        return None


def _acquire(root: Location) -> Holder:
    pid, now = os.getpid(), time.time()
    started = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    holder = Holder(secrets.token_hex(8), socket.gethostname(), pid, _machine(), _born(pid), started, now)
    found = read_lock(root)
    if found is not None:
        if not found.is_dead():
            raise UserError(_refusal(root, found))
        logger.info(
            "the lock of a build that was killed (process %d on %s, started %s) is taken over",
            found.pid,
            found.host,
            found.started,
        )
        retry.write(root / LOCK_FILE, _content(holder))
    elif _create(root / LOCK_FILE, _content(holder)):
        return holder
    # Here the last writer wins: wait until whoever read the lock before our write has written, too.
    time.sleep(SETTLE_S)
    found = read_lock(root)
    if found is None:  # released meanwhile, or half written by a build that was killed in that moment
        retry.write(root / LOCK_FILE, _content(holder))
        time.sleep(SETTLE_S)
        found = read_lock(root)
    if not _is(found, holder):
        raise UserError(_refusal(root, found))
    return holder


def _create(location: Location, content: bytes) -> bool:
    """Make the lock if there is none; True when it is certain that nobody else can have made it, too."""
    if location.is_local:
        with storage_errors(location.url):
            os.makedirs(os.path.dirname(location.path) or ".", exist_ok=True)
            try:
                with open(location.path, "xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
        return True
    if not _put_new(location, content):
        return False
    # A store that does not know the condition overwrites. Then the same put succeeds twice, and nothing is certain.
    return not _put_new(location, content)


def _put_new(location: Location, content: bytes) -> bool:
    """Put an object unless there is one; True when it was put, which a store without conditions always does."""

    def put() -> bool:
        with storage_errors(location.url):
            try:
                location.fs.pipe_file(location.path, content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                response = getattr(error.__cause__, "response", {})
                if response.get("Error", {}).get("Code") in ("PreconditionFailed", "ConditionalRequestConflict"):
                    return False
                if response.get("Error", {}).get("Code") != "NotImplemented":
                    raise
                location.fs.pipe_file(location.path, content)
            return True

    return retry.retrying(put)


def _is(found: Holder | None, holder: Holder) -> bool:
    return found is not None and found.token == holder.token


def _content(holder: Holder) -> bytes:
    return canonical_json(asdict(holder))


def _refusal(root: Location, found: Holder | None) -> str:
    if found is None:
        return f"{root}: another build came and went at this moment: give the command again"
    return (
        f"{root}: another build is at work there: process {found.pid} on {found.host}, started {found.started}: wait "
        f"for it, or choose another --out (should it be dead, its lock counts as stale {STALE_S / 60:.0f} minutes "
        f"after its last sign of life; to be rid of it now, remove {root / LOCK_FILE})"
    )


def _machine() -> str:
    """The same for two processes exactly when a pid means the same to both, as far as can be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _lives(pid: int, born: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and is another user's
    return _born(pid) == born  # or its number was given to another process


def _born(pid: int) -> str:
    """The process's start in clock ticks since boot (proc(5), field 22); "" for a zombie, or without /proc."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()
            return "" if state in "ZX" else fields[18]
    except (OSError, IndexError):
        return ""
