"""A shard read once from its first byte to its last, in bounded memory: its sha256 and what its members really are.

The tar itself says where its samples lie; the index is only asked where to go on after a damaged place.
"""

from __future__ import annotations

import hashlib
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from shards.format.tar_members import BLOCK, parse_header
from shards.storage.location import Location
from shards.storage.ranges import Bytes, Read, start_read

CHUNK = 8 * 2**20  # bytes a request; two of them are in memory beside the sample that is looked at
TAR_RECORD = 10240  # a tar ends with zeros up to a whole record


@dataclass(frozen=True, slots=True)
class Found:
    """A sample as it lies in the shard: its key, place and length in bytes, and its two members."""

    key: str
    offset: int
    nbytes: int
    crc32: int
    jpg: bytes
    json: bytes


@dataclass(frozen=True, slots=True)
class Broken:
    """A place where the shard is not what the format promises; `key` is "" where that is not known."""

    key: str
    offset: int
    what: str


class ShardBytes:
    """Reads an object from the front, one chunk ahead, and takes its sha256.

    Args:
        location: the object.
        size: its length as it should be; one byte more is asked for, so that a longer object shows.
        on_bytes: told how many bytes have come.
    """

    def __init__(self, location: Location, size: int, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        self.size = size
        self.position = 0  # of the next byte to be taken
        self.received = 0
        self._location, self._on_bytes = location, on_bytes
        self._held = memoryview(b"")
        self._digest = hashlib.sha256()
        self._asked = 0
        self._next: Future[Bytes] | None = self._ask()

    @property
    def sha256(self) -> str:
        """Of all bytes that have come, hex."""
        return self._digest.hexdigest()

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or fewer where the object ends; the file system's own errors."""
        parts = []
        while count and (self._held or self._fill()):
            part, self._held = self._held[:count], self._held[count:]
            parts.append(part)
            count -= len(part)
            self.position += len(part)
        return b"".join(parts)

    def skip_to(self, position: int) -> None:
        """Leave out what lies before `position`."""
        while self.position < position and self.take(min(position - self.position, CHUNK)):
            pass

    def close(self) -> None:
        """Give up what was asked for."""
        if self._next is not None:
            self._next.cancel()

    def _ask(self) -> Future[Bytes] | None:
        start, end = self._asked, min(self._asked + CHUNK, self.size + 1)
        if start >= end:
            return None
        self._asked = end
        return start_read(Read(self._location, start, end))

    def _fill(self) -> bool:
        if self._next is None:
            return False
        asked = self._asked
        data, ahead = self._next.result(), self._ask()
        self.received += len(data)
        self._digest.update(data)
        self._on_bytes(len(data))
        self._held = memoryview(data)
        if self.received < min(asked, self.size) and ahead is not None:
            ahead.cancel()  # the object has ended
            ahead = None
        self._next = ahead
        return bool(data)


def walk(source: ShardBytes, starts: Sequence[int]) -> Iterator[Found | Broken]:
    """Everything in a shard, in order; `source` has been read to its end afterwards.

    Args:
        source: the shard, of which nothing has been taken.
        starts: where samples should begin, ascending: after a broken place the next of them is tried.
    """
    while True:
        offset = source.position
        item = _read_sample(source)
        if item is None:
            break
        yield item
        if isinstance(item, Broken):
            later = bisect_left(starts, max(source.position, offset + 1))
            if later == len(starts):
                break
            source.skip_to(starts[later])
            if source.position < starts[later]:
                break  # the shard ends before
    while source.take(CHUNK):
        pass


def _read_sample(source: ShardBytes) -> Found | Broken | None:
    """The two members at the source's position; None at the end of the tar."""
    offset = source.position
    block = source.take(BLOCK)
    if block.count(0) == BLOCK:
        return _read_end(source, offset)
    parts, members, key = [block], [], ""
    for extension in ("jpg", "json"):
        if extension == "json":
            parts.append(block := source.take(BLOCK))
        here = source.position - len(block)
        try:
            header = parse_header(block)
        except ValueError as error:
            if len(block) < BLOCK:
                return Broken(key, offset, f"the shard ends at byte {source.position}, where a header should be")
            return Broken(key, offset, f"there is no tar header at byte {here} ({error})")
        if header is None or not header.key or header.extension != extension or key not in ("", header.key):
            name = "the end of the tar" if header is None else f"a member {header.name!r}"
            return Broken(key, offset, f"{name} lies at byte {here}, where {key or '<key>'}.{extension} should be")
        key = header.key
        if not header.canonical:
            return Broken(key, offset, f"the header of {header.name} at byte {here} has another mode, time or owner")
        here = source.position
        # A size that cannot be is not worth the memory.
        data = source.take(header.padded) if here + header.padded <= source.size else b""
        if len(data) < header.padded:
            end = min(source.size, source.received) if data else source.size
            return Broken(
                key, offset, f"{header.name} should end at byte {here + header.padded}, the shard ends at {end}"
            )
        parts.append(data)
        members.append(data[: header.size])
    whole = b"".join(parts)
    return Found(key, offset, len(whole), zlib.crc32(whole), *members)


def _read_end(source: ShardBytes, offset: int) -> Broken | None:
    """What follows the first block of zeros: more of them, up to a whole record."""
    end = -(-(offset + 2 * BLOCK) // TAR_RECORD) * TAR_RECORD
    rest = source.take(end - source.position)
    if rest.count(0) != len(rest):
        return Broken("", offset, "the tar ends here, but more follows")
    return None
