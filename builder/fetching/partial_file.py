"""What has arrived of a download, in a file that a killed process leaves and the next one continues.

The file starts with a line that states the version of the object. Pieces follow: offset, length and CRC-32, then the
bytes. A piece counts only if it continues the one before and has its checksum, so that neither a kill nor a crash of
the machine can add wrong bytes. One process at a time has the file, which the system unlocks when the process ends;
another one that downloads the same object meanwhile keeps nothing.
"""

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, Self

from isal import isal_zlib as zlib

LARGEST = 64 << 20  # bytes of a piece

_PIECE = struct.Struct("<QII")  # offset, length, CRC-32


class PartialFile:
    """The pieces of one version of an object, from some offset on; made by `open`."""

    def __init__(self, path: str, file: BinaryIO, start: int) -> None:
        self._path, self._file = path, file
        self._start = start  # of the first piece in the file
        self._broken = False

    @classmethod
    def open(cls, path: str, version: str) -> Self | None:
        """Open the file at `path`, emptied if it is of another version; None if it is in use or cannot be written."""
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:  # otherwise another process has just deleted it
                first = f"{version}\n".encode()
                if file.read(len(first)) != first:
                    file.seek(0)
                    file.truncate()
                    file.write(first)
                return cls(path, file, len(first))
        except OSError:
            pass
        file.close()
        return None

    def pieces(self, start: int) -> Iterator[bytes]:
        """Yield the pieces from byte `start` of the object on, and remove what follows the last good one."""
        try:
            place = self._file.tell()
            while data := self._read_piece(start):
                place = self._file.tell()
                start += len(data)
                yield data
            self._file.seek(place)
            self._file.truncate()
        except OSError:  # the disk has failed
            self._delete()

    def _read_piece(self, start: int) -> bytes:
        """Return the next piece; nothing if it is damaged, or does not start there."""
        header = self._file.read(_PIECE.size)
        if len(header) < _PIECE.size:
            return b""
        offset, length, crc = _PIECE.unpack(header)
        if offset != start or length > LARGEST:
            return b""
        data = self._file.read(length)
        return data if len(data) == length and zlib.crc32(data) == crc else b""

    def add(self, start: int, data: bytes) -> None:
        """Append a piece, after all of `pieces` were read; an error, such as a full disk, deletes the file."""
        if self._broken:
            return
        try:
            self._file.write(_PIECE.pack(start, len(data), zlib.crc32(data)))
            self._file.write(data)
            self._file.flush()
        except OSError:
            self._delete()

    def close(self, *, keep: bool) -> None:
        """Unlock the file for the next process, or delete it, also if it has no piece."""
        if self._file.closed:
            return
        with suppress(OSError), self._file:
            if not keep or os.fstat(self._file.fileno()).st_size <= self._start:
                self._delete()

    def _delete(self) -> None:
        self._broken = True
        with suppress(OSError):
            os.unlink(self._path)
        with suppress(OSError):  # frees the disk now, and drops what it did not take
            self._file.truncate(0)
