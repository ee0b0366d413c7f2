"""A single pass over a shard in bounded memory: its sha256, and the samples that it really holds.

Samples are found by their tar headers. The index only says where to continue after a damaged place.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

from isal import isal_zlib as zlib

from shards.format.sample import EXTENSIONS
from shards.format.shard_tar import BLOCK, parse_header
from shards.storage.location import Location
from shards.storage.reads import Read, start_read

CHUNK = 8 * 2**20  # bytes per request; memory holds two chunks and the sample that is being checked
TAR_RECORD = 10240  # bytes; a tar is filled with zeros up to a multiple of it


class Found(NamedTuple):
    """A sample in the shard: its key, offset and length in bytes, crc32, and its members by extension."""

    key: str
    offset: int
    nbytes: int
    crc32: int
    members: dict[str, bytes]


class Broken(NamedTuple):
    """A place where the shard does not follow the format; `key` is "" if it is unknown."""

    key: str
    offset: int
    what: str


class ShardBytes:
    """Sequential reader of an object that prefetches one chunk and computes the sha256.

    One byte more than `size` is requested, to detect an object that is longer. `on_bytes` receives the number of bytes
    of each chunk.
    """

    def __init__(self, location: Location, size: int, on_bytes: Callable[[int], None]) -> None:
        self.size = size
        self.position = 0  # of the next byte that `take` returns
        self.received = 0  # bytes
        starts = range(0, size + 1, CHUNK)
        # Not a list: the size is what `dataset.json` says, which may be any number.
        self._chunks = _prefetched(Read(location, start, min(start + CHUNK, size + 1)) for start in starts)
        self._on_bytes = on_bytes
        self._buffer = memoryview(b"")
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex digest of all bytes that were received."""
        return self._digest.hexdigest()

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, or fewer at the end of the object; raises the file system's own errors."""
        parts = []
        while count and (self._buffer or self._fill()):
            part, self._buffer = self._buffer[:count], self._buffer[count:]
            parts.append(part)
            count -= len(part)
            self.position += len(part)
        return b"".join(parts)

    def skip_to(self, position: int) -> None:
        """Skip the bytes before `position`."""
        while self.position < position and self.take(min(position - self.position, CHUNK)):
            pass

    def close(self) -> None:
        """Cancel the request in flight."""
        self._chunks.close()

    def _fill(self) -> bool:
        """Wait for the next chunk; False at the end of the object."""
        data = next(self._chunks, b"")
        self.received += len(data)
        self._digest.update(data)
        self._on_bytes(len(data))
        self._buffer = memoryview(data)
        return bool(data)


def _prefetched(reads: Iterator[Read]) -> Generator[bytes, None, None]:
    """Yield the bytes of each read while the next one is under way, up to the end of the object."""
    ahead = start_read(next(reads))
    try:
        for following in reads:
            data = bytes(ahead.result())
            if len(data) < CHUNK:  # the object has ended
                yield data
                return
            ahead = start_read(following)
            yield data
        yield bytes(ahead.result())
    finally:
        ahead.cancel()


def walk(source: ShardBytes, starts: Sequence[int]) -> Iterator[Found | Broken]:
    """Yield everything in a shard, in order, and read `source` to its end.

    After a broken place the scan continues at the next of `starts`, offsets where samples should begin, ascending.
    """
    while (item := _read_sample(source)) is not None:
        yield item
        if isinstance(item, Broken):
            later = bisect_left(starts, max(source.position, item.offset + 1))
            if later == len(starts):
                break
            source.skip_to(starts[later])
            if source.position < starts[later]:
                break  # the shard ends before it
    while source.take(CHUNK):
        pass


def _read_sample(source: ShardBytes) -> Found | Broken | None:
    """Read the two members of the next sample; None at the end of the tar."""
    offset = source.position
    block = source.take(BLOCK)
    if block.count(0) == BLOCK:
        return _read_end(source, offset)
    parts, members, key = [block], dict[str, bytes](), ""
    for wanted in (EXTENSIONS, ("json",)):
        if members:
            parts.append(block := source.take(BLOCK))
        here = source.position - len(block)
        try:
            header = parse_header(block)
        except ValueError as error:
            if len(block) < BLOCK:
                return Broken(key, offset, f"the shard ends at byte {source.position}, where a header should be")
            return Broken(key, offset, f"there is no tar header at byte {here} ({error})")
        if header is None or not header.key or header.extension not in wanted or key not in ("", header.key):
            name = "the end of the tar" if header is None else f"a member {header.name!r}"
            return Broken(
                key, offset, f"{name} is at byte {here}, where {key or '<key>'}.{' or .'.join(wanted)} should be"
            )
        key = header.key
        if not header.canonical:
            return Broken(key, offset, f"the header of {header.name} at byte {here} has another mode, time or owner")
        end = source.position + header.padded
        data = source.take(header.padded) if end <= source.size else b""  # an impossible size allocates no memory
        if len(data) < header.padded:
            last = min(source.size, source.received) if data else source.size
            return Broken(key, offset, f"{header.name} should end at byte {end}, the shard ends at {last}")
        parts.append(data)
        members[header.extension] = data[: header.size]
    whole = b"".join(parts)
    return Found(key, offset, len(whole), zlib.crc32(whole), members)


def _read_end(source: ShardBytes, offset: int) -> Broken | None:
    """Read what follows the first block of zeros, which must be zeros up to a multiple of a tar record."""
    end = -(-(offset + 2 * BLOCK) // TAR_RECORD) * TAR_RECORD
    rest = source.take(end - source.position)
    return Broken("", offset, "the tar ends here, but more follows") if any(rest) else None
