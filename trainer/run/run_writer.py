"""One writer per run folder: two trainings that write there at once would mix their checkpoints and logs.

On a disk the writer locks the folder, and the system unlocks it when the process ends, however it ends; another
training waits a little for that, and is refused. An object store has no locks: there the newest training takes the run
over by writing its name, and the one before ends when it next wants to write.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import time
from contextlib import suppress
from typing import Self

from shards.common.errors import StorageError, UserError
from shards.storage.location import Location

WRITER_FILE = "writer.json"
# How long to wait for a training that is about to end: ranks whose launcher died save first (see `launcher`).
TIMEOUT_S = 60.0
POLL_S = 0.5

log = logging.getLogger("trainer.run.run_writer")


class RunWriter:
    """The right to write into a run's folder: from `claim` until the end of the context manager."""

    timeout_s = TIMEOUT_S

    def __init__(self, run: Location) -> None:
        self.run = run
        self._folder: int | None = None  # descriptor of the locked folder
        self._is_new = False
        self._token = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is None:
            return
        if self._is_new:  # a training that failed before it wrote anything leaves nothing
            with suppress(OSError):
                os.rmdir(self.run.path)
        os.close(self._folder)
        self._folder = None

    def claim(self) -> None:
        """Become the writer of the folder; UserError if another training on this disk stays the writer."""
        if self.run.is_local:
            self._lock()
            return
        self._token = secrets.token_hex(8)
        who = f"process {os.getpid()} on {socket.gethostname()}"
        (self.run / WRITER_FILE).write(json.dumps({"token": self._token, "writer": who}).encode())

    def check(self) -> None:
        """Raise a UserError if another training has taken the run over since `claim`; call it before writing."""
        if not self._token:
            return
        try:
            found = json.loads((self.run / WRITER_FILE).read())
        except (ValueError, RecursionError):
            return
        except StorageError as error:
            if error.missing:  # somebody tidied up
                return
            raise
        if isinstance(found, dict) and found.get("token", self._token) != self._token:
            who = str(found.get("writer"))[:200]
            raise UserError(f"{self.run}: another training ({who}) has taken this run over: this one ends, unsaved")

    def _lock(self) -> None:
        deadline, is_logged = time.monotonic() + self.timeout_s, False
        self._is_new = not os.path.exists(self.run.path)
        while not self._try_lock():
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{self.run}: another training is writing there: wait until it has ended, or give another --run.dir"
                )
            if not is_logged:
                log.warning("%s: waiting for another training to end, which still writes there", self.run)
            is_logged = True
            time.sleep(POLL_S)

    def _try_lock(self) -> bool:
        """Return whether this process has the folder's lock now, or there can be none."""
        folder = None
        try:
            os.makedirs(self.run.path, exist_ok=True)
            folder = os.open(self.run.path, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(folder), os.stat(self.run.path)):  # not one that was removed meanwhile
                self._folder, folder = folder, None
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:  # this disk has no locks
            return True
        finally:
            if folder is not None:
                os.close(folder)
        return False
