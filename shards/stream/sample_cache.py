"""A bounded cache of samples on a local disk, shared by all processes of the machine. Optional.

    cache = SampleCache("/scratch/cache", 200 * 10**9)
    stream = ShardStream(open_dataset("s3://bucket/prefix"), "train", batch_size=8, cache=cache)

It serves several epochs over storage whose egress is paid or slow; without it no local disk is used.

There is one file per sample, in 256 folders, named by a hash of everything that the index says of the sample: after a
dataset was built again, unchanged samples are still found and changed ones never are. A kill leaves a file whole or
absent; what a crash of the machine damages, the reader detects by the crc32.

A writer holds one lock (flock of `state`), and counts the bytes of a sample before it writes them: the files are within
the limit even if it is killed. It can then leave one more sample, in `incoming`, which the next one overwrites. Readers
take no lock.

When the disk is full, the samples with the lowest names are kept: a fixed random part of the dataset. A cache that
holds a share f of it then serves f of every epoch; dropping the least recently used instead would serve
f + (1 - f) ln(1 - f) of a shuffled epoch: 0.15 for f = 0.5. Samples that were not used for a day, mostly of other
datasets, are dropped first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from shards.common.argument_checks import real
from shards.common.errors import StorageError
from shards.format.index import Index
from shards.storage.local_files import atomic_write

STALE_S = 24 * 3600.0  # samples that were not used for longer are dropped first
TOUCH_S = 3600.0  # by how much the recorded time of last use may be out of date
LOCK_TIMEOUT_S = 0.5  # a process that does not get the lock in time does not store the sample
SLACK = 0.05  # share of the limit that is freed at once, so that the disk is not searched for every sample
BLOCK = 4096  # bytes; a file is counted in whole blocks of the disk

_NAME = re.compile(r"[0-9a-f]{32}")

log = logging.getLogger("shards.stream.sample_cache")


@dataclass(frozen=True, slots=True)
class _State:
    nbytes: int  # counted so far
    refused: int  # the first 64 bits of the lowest name that is refused
    counted: float  # when the files were last counted, in seconds since 1970

    LAYOUT = struct.Struct("<QQd")

    @classmethod
    def read(cls, file: int) -> _State | None:
        data = os.pread(file, cls.LAYOUT.size + 1, 0)
        return cls(*cls.LAYOUT.unpack(data)) if len(data) == cls.LAYOUT.size else None

    def write(self, file: int) -> None:
        os.pwrite(file, self.LAYOUT.pack(self.nbytes, self.refused, self.counted), 0)


@dataclass
class SampleCache:
    """Samples on a local disk.

    Attributes:
        directory: a local path, created if it does not exist, whose folder `samples` belongs to the cache.
        limit: bytes that all samples together may take.

    Raises:
        StorageError: the directory cannot be created or written, or the limit is below one block of the disk.
    """

    directory: str | os.PathLike[str]
    limit: int
    _broken: bool = field(default=False, init=False, repr=False)  # the disk has failed: nothing more is stored

    def __post_init__(self) -> None:
        real("the limit of a cache, in bytes,", self.limit)
        if not isinstance(self.directory, str | os.PathLike) or not os.fspath(self.directory):
            raise StorageError(f"the directory of a cache is {self.directory!r}: give a local path")
        self.directory = os.fspath(self.directory)
        if "://" in self.directory:
            raise StorageError(f"cache {self.directory}: a cache is on a disk of this machine: give a local path")
        if self.limit < BLOCK:
            raise StorageError(f"cache {self.directory}: its limit is {self.limit} bytes: give at least {BLOCK}")
        self._root = Path(self.directory, "samples")
        try:
            for number in range(256):
                (self._root / f"{number:02x}").mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                state = _State.read(file) if file is not None else None
                if file is not None and (state is None or state.nbytes > self.limit):
                    self._make_room(0).write(file)
        except OSError as error:
            message = f"cache {self.directory}: cannot be used ({error.strerror}): give another folder, or none"
            raise StorageError(message) from error

    def key(self, index: Index, row: int) -> str:
        """Return the name of a sample: 32 hex digits, a hash of everything that the index says of its bytes."""
        place = index.shard_paths[int(index.shard[row])], int(index.offset[row]), int(index.nbytes[row])
        identity = repr((index.image_id(row), *place, int(index.crc32[row])))
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def has(self, key: str) -> bool:
        """Return whether the sample is in the cache; if so, the kernel starts to read it for `get`."""
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > TOUCH_S:
                    with contextlib.suppress(OSError):  # another user's file, or a disk that became read-only
                        os.utime(file.fileno())
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            return True
        except OSError:
            return False

    def get(self, key: str) -> bytes | None:
        """Return the bytes of a sample, unchecked; None if they are gone or the disk fails."""
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up("cannot be read", error)
            return None

    def drop(self, key: str) -> None:
        """Remove a sample whose bytes are wrong."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            self._give_up("a damaged sample cannot be removed", error)

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Keep a sample if there is room, or room can be made. A disk that fails is logged once and not used again."""
        if self._broken:
            return
        path = self._path(key)
        try:
            if path.exists():
                return
            with self._locked() as file:
                if file is None:
                    return
                state, taken = _State.read(file), _taken(len(data))
                if state is None or self._is_worth_a_count(state, key, taken):
                    state = self._make_room(taken)
                    state.write(file)
                if _rank(key) >= state.refused or state.nbytes + taken > self.limit:
                    return
                # Counted first: a kill before the rename leaves a count that is too high, until the next count.
                replace(state, nbytes=state.nbytes + taken).write(file)
                try:
                    with atomic_write(str(path), temporary=str(self._root / "incoming"), durable=False) as incoming:
                        incoming.write(data)
                except OSError:
                    state.write(file)
                    raise
        except OSError as error:
            self._give_up("cannot be written", error)

    def _is_worth_a_count(self, state: _State, key: str, taken: int) -> bool:
        """Return whether counting the files may make room for a sample."""
        is_full = state.nbytes + taken > self.limit
        may_be_stale = abs(time.time() - state.counted) > TOUCH_S
        return taken <= self.limit and (is_full if _rank(key) < state.refused else may_be_stale)

    def _make_room(self, needed: int) -> _State:
        """Count the files, and drop some if `needed` more bytes do not fit. Needs the lock."""
        entries = [
            (entry.name, _taken(status.st_size), status.st_mtime)
            for folder in sorted(self._root.iterdir())
            if folder.is_dir()
            for entry in os.scandir(folder)
            if _NAME.fullmatch(entry.name) and (status := entry.stat())
        ]
        now, total, refused = time.time(), sum(taken for _, taken, _ in entries), 2**64 - 1
        if total + needed > self.limit:
            room = int((1 - SLACK) * self.limit) - needed
            # Dropped from the end: first the stale samples, then those with the highest names.
            entries.sort(key=lambda entry: (now - entry[2] > STALE_S, entry[0]))
            while entries and total > room:
                name, taken, used = entries.pop()
                self._path(name).unlink(missing_ok=True)
                total -= taken
                if now - used <= STALE_S:
                    refused = _rank(name)
        return _State(total, refused, now)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int | None]:
        """Yield the open file `state`, locked; None if others hold the lock for longer than `LOCK_TIMEOUT_S`."""
        file = os.open(self._root / "state", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            deadline = time.monotonic() + LOCK_TIMEOUT_S
            while not (locked := _lock(file)) and time.monotonic() <= deadline:
                time.sleep(0.001)
            yield file if locked else None
        finally:
            os.close(file)

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / key

    def _give_up(self, what: str, error: OSError) -> None:
        if not self._broken:
            self._broken = True
            message = "cache %s: %s (%s): the run continues, this process stores nothing more"
            log.warning(message, self.directory, what, error)


def _lock(file: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _taken(nbytes: int) -> int:
    """Return the bytes of the disk's blocks that a file takes."""
    return -(-nbytes // BLOCK) * BLOCK


def _rank(key: str) -> int:
    return int(key[:16], 16)
