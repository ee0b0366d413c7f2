"""The lock of a root: one build at a time, and a build that died does not keep it.

The lock is an object that states its holder. It is created by a conditional put, which on a disk is an exclusive
create, and is renewed every `BEAT_S`. It is stale if it was not renewed for `STALE_S`, or at once if its holder ran on
this machine, in the same container if any, and the process is gone. A stale lock is overwritten, and so is any lock on
a store without conditional puts: there the last writer holds it, and a holder that lost its lock stops after its next
heartbeat.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from builder.fetching.fetch import Refusal, Request, fetch
from shards.common.errors import StorageError, UserError
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
    """The build that holds a lock.

    Attributes:
        token: random text, different for each build.
        machine: host name, boot id and namespace of process ids; equal for processes that see each other's ids.
        started: start of the build, UTC, ISO 8601.
        beat: last renewal of the lock, in seconds since 1970.
    """

    token: str
    host: str
    pid: int
    machine: str
    started: str
    beat: float


class BuildLock:
    """A lock of a root, held while the context manager is entered."""

    def __init__(
        self, root: Location, now: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._root, self._now, self._sleep = root, now, sleep
        started = datetime.fromtimestamp(now(), UTC).isoformat(timespec="seconds")
        host, pid = socket.gethostname(), os.getpid()
        self._holder = Holder(secrets.token_hex(8), host, pid, _machine(), started, now())
        self._lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)

    def __enter__(self) -> BuildLock:
        """Acquire the lock.

        Raises:
            UserError: another build holds it.
            StorageError: the root cannot be read or written.
        """
        stale = refuse_if_held(self._root, self._now)
        if stale is not None or not retry.create(self._root / LOCK_FILE, self._content()):
            self._overwrite(stale)
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

    def check(self) -> None:
        """Raise UserError if another build has taken the lock over."""
        if self._lost:
            raise UserError(
                f"{self._root}: another build took over because this one did not respond for {STALE_S:.0f} s: "
                "let the other one finish"
            )

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
            logger.info("taking over the lock of process %d on %s, started %s", stale.pid, stale.host, stale.started)
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
    """Return the holder of a stale lock, or None without a lock; writes nothing.

    Raises:
        UserError: a running build holds the lock.
    """
    found = read_lock(root)
    if found is None or now() - found.beat > STALE_S or _has_died_here(found):
        return found
    raise UserError(
        f"{root}: another build is at work there: process {found.pid} on {found.host}, started {found.started}: wait "
        f"for it, or choose another --out (should it be dead, its lock is stale {STALE_S / 60:.0f} minutes after its "
        f"last heartbeat; to discard the lock now, remove {root / LOCK_FILE})"
    )


def read_lock(root: Location) -> Holder | None:
    """Return who holds the lock, or None without a lock."""
    [answer] = fetch([Request(root / LOCK_FILE)])
    if isinstance(answer, Refusal):
        return None
    with suppress(ValueError, TypeError, KeyError):
        value = json.loads(answer)
        numbers = {"pid": int(value["pid"]), "beat": float(value["beat"])}
        return Holder(**{field.name: value[field.name] for field in fields(Holder)} | numbers)
    # Killed while it created the lock, or damaged.
    return Holder(token="", host="an unknown host", pid=0, machine="", started="at an unknown time", beat=0.0)


def _has_died_here(holder: Holder) -> bool:
    """Return whether the holder ran on this machine and is gone."""
    if holder.machine != _machine():
        return False
    try:
        os.kill(holder.pid, 0)
    except OSError as error:  # a PermissionError means that it runs, for another user
        return isinstance(error, ProcessLookupError)
    return False


def _machine() -> str:
    found = [socket.gethostname()]
    with suppress(OSError):  # Linux only, and not readable in every sandbox
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):  # containers can share the host's name, but not its process ids
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)
