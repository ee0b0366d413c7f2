"""Members of remote zips by coalesced range reads: no zip is downloaded whole.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (4.3.7 local headers, 4.4.5 methods). The standard
library reads end records and central directories, ZIP64 included; the members are cut out here.
"""

from __future__ import annotations

import logging
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from builder.fetching.fetch import Inventory, RangeFile, Refusal, Request, fetch, length_of
from builder.fetching.table_cache import Cache
from builder.fetching.traffic import PROCESS, Meter
from builder.tasks.plan import Member
from shards.common.errors import StorageError, UserError
from shards.storage.location import Location
from shards.storage.ranges import Description

ZIPS_AT_ONCE = 4  # a real train zip's directory takes about 100 MB in memory while it is read
TAIL_BYTES = 66 << 10  # end record, its longest comment (64 KiB), and the ZIP64 records
GAP_BYTES = 16 << 10  # reading so much for nothing costs less than another request
SPAN_BYTES = 8 << 20  # the largest merged read
SPARE_BYTES = 1 << 20  # read for nothing in all, where no other allowance is given
DENSE = 2 / 3  # where more than this part of a stretch is wanted, it is read whole
REPEATS = 3  # reads of a damaged member, after the first
MEMBER_BYTES = 64 << 20  # the largest member, compressed or not, that is believed to be a mask

# The columns are the fields of a `Member`, without the zip they all lie in.
DIRECTORY = pa.schema(
    [
        ("name", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("method", pa.int32()),
        ("crc32", pa.uint32()),
        ("compressed", pa.int64()),
        ("size", pa.int64()),
    ]
)

_CONTENT = "zip directory"  # what the cache calls it

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LONGEST_HEADER = _LOCAL_HEADER.size + 2 * 0xFFFF
_DESCRIPTOR_BYTES = 24

logger = logging.getLogger(__name__)


class MemberError(Exception):
    """A member that is not what its zip's directory says; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `end` of one zip, which hold the members at `members` (positions in the list planned for)."""

    zip_url: str
    start: int
    end: int
    members: tuple[int, ...]


def locate_members(
    wanted: Mapping[Location, Collection[str]], *, cache: Cache | None = None, inventory: Inventory | None = None
) -> dict[str, Member]:
    """Look files up in the central directories of zips; names that they do not hold are left out.

    Costs about two requests a zip, those of all zips at once, and another where a directory is longer than
    `TAIL_BYTES`. With a `cache` the whole directories are kept there, and nothing is read the next time.

    Args:
        wanted: zip -> the names to look up in it; no name is looked up in two.
        inventory: what is known of the store's objects; the zips are the versions that it tells of.

    Raises:
        UserError: not a zip, or a damaged one.
        StorageError: one is missing, cannot be read, or was replaced while it was being read.
    """
    inventory = inventory or Inventory()
    inventory.ask(list(wanted))
    told = {location: inventory.of(location) for location in wanted}
    entries = {} if cache is None else {zip_: cache.entry(zip_, told[zip_], _CONTENT) for zip_ in wanted}
    found = {zip_: entry.read(DIRECTORY, partial(_named, wanted[zip_])) for zip_, entry in entries.items()}
    unread = [location for location in wanted if found.get(location) is None]
    tails = fetch([_tail(location, told[location]) for location in unread])

    def read(location: Location, tail: bytes | Refusal) -> None:
        if isinstance(tail, Refusal):
            raise StorageError(f"{location}: {tail.reason} now: give the same command again")
        directory = _read_directory(location, told[location], tail)
        if location in entries:
            with entries[location].write(DIRECTORY) as keep:
                keep(directory)
        found[location] = _named(wanted[location], [directory])

    with ThreadPoolExecutor(ZIPS_AT_ONCE) as pool:
        list(pool.map(read, unread, tails))
    return {row["name"]: Member(zip_url=location.url, **row) for location in wanted for row in found[location] or ()}


def directory_is_cached(location: Location, cache: Cache | None) -> bool:
    """Whether `locate_members` need not read the zip, as long as the zip has not changed; asks nobody."""
    return cache is not None and cache.holds(location, _CONTENT)


def _named(names: Collection[str], tables: Iterable[pa.Table]) -> list[dict[str, Any]]:
    wanted = pa.array(sorted(names), pa.string())
    return [row for table in tables for row in table.filter(pc.is_in(table["name"], value_set=wanted)).to_pylist()]


def _tail(location: Location, told: Description) -> Request:
    length = length_of(location, told)
    return Request(location, max(0, length - TAIL_BYTES), length, told.etag)


def _read_directory(location: Location, told: Description, tail: bytes) -> pa.Table:
    """All members, by `DIRECTORY`, in the directory's order; the last of several of one name, as `zipfile` does it."""
    try:
        file = RangeFile(location, told, {length_of(location, told) - len(tail): tail})
        with zipfile.ZipFile(file) as archive:
            starts = sorted(info.header_offset for info in archive.infolist())
            following = dict(zip(starts, [*starts[1:], archive.start_dir]))
            infos = list(archive.NameToInfo.values())
            columns = {
                "name": [info.filename for info in infos],
                "start": [info.header_offset for info in infos],
                # What lies between a member and the next header is its own, but for zips with holes.
                "end": [
                    min(
                        following[info.header_offset],
                        info.header_offset + _LONGEST_HEADER + info.compress_size + _DESCRIPTOR_BYTES,
                    )
                    for info in infos
                ],
                "method": [info.compress_type for info in infos],
                "crc32": [info.CRC for info in infos],
                "compressed": [info.compress_size for info in infos],
                "size": [info.file_size for info in infos],
            }
            file.check_unchanged()
            return pa.table(columns, schema=DIRECTORY)
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OverflowError) as error:
        raise UserError(f"{location}: not a zip that can be read ({error}): check --annotations") from error


def merge_spans(members: Sequence[Member], *, gap: int = GAP_BYTES, largest: int = SPAN_BYTES) -> list[Span]:
    """Merge members that lie near each other into single reads.

    Args:
        members: of any zips, in any order.
        gap: bytes between two members that are read for nothing rather than asked around.
        largest: a merged span is no longer than this; a longer member is a span of its own.

    Returns:
        Spans in the order (zip, start); each member lies whole in exactly one.
    """
    spans: list[Span] = []
    for index in sorted(range(len(members)), key=lambda i: (members[i].zip_url, members[i].start, members[i].end)):
        member = members[index]
        last = spans[-1] if spans else None
        if last is not None and last.zip_url == member.zip_url and member.start - last.end <= gap:
            end = max(last.end, member.end)
            if end - last.start <= largest:
                spans[-1] = Span(last.zip_url, last.start, end, (*last.members, index))
                continue
        spans.append(Span(member.zip_url, member.start, member.end, (index,)))
    return spans


def extract(data: bytes | memoryview, member: Member) -> bytes:
    """The uncompressed bytes of a member.

    Args:
        data: from the member's local header on, at least to the end of its compressed bytes.

    Raises:
        MemberError: damaged, or packed in a way that is not supported.
    """
    if len(data) < _LOCAL_HEADER.size:
        raise MemberError("no room for a local header")
    signature, _, flags, _, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack_from(data)
    if signature != b"PK\x03\x04":
        raise MemberError("no local header where the directory says")
    if flags & 1:
        raise MemberError("encrypted")
    start = _LOCAL_HEADER.size + name_length + extra_length
    body = data[start : start + member.compressed]
    if len(body) != member.compressed:
        raise MemberError("reaches into the next member")
    if member.method == zipfile.ZIP_STORED:
        content = bytes(body)
    elif member.method == zipfile.ZIP_DEFLATED:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(body, member.size + 1)
        except zlib.error as error:
            raise MemberError(f"cannot be inflated: {error}") from error
    else:
        raise MemberError(f"compression method {member.method} is not supported")
    if len(content) != member.size:
        raise MemberError(f"its length is not the {member.size} bytes that the directory says")
    if zlib.crc32(content) != member.crc32:
        raise MemberError("its CRC is not the one in the directory")
    return content


def plan_reads(members: Sequence[Member], *, spare: int, gap: int = GAP_BYTES, largest: int = SPAN_BYTES) -> list[Span]:
    """The ranges to read, so that little is read for nothing.

    Where more than `DENSE` of the stretch from a zip's first wanted member to its last is wanted, the stretch is read
    in consecutive ranges, which costs less than half of the wanted bytes on top. Elsewhere gaps of up to `gap` bytes
    are read for nothing, the smallest first, until they have cost `spare` bytes over all zips.

    Returns:
        Spans in the order (zip, start), each of `largest` bytes at most, but for members that are longer.
    """
    zips: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        zips.setdefault(member.zip_url, []).append(index)
    dense = {url: _is_dense([members[index] for index in held]) for url, held in zips.items()}
    affordable = _affordable_gap([member for member in members if not dense[member.zip_url]], spare, gap)
    spans: list[Span] = []
    for url, held in sorted(zips.items()):
        merged = merge_spans(
            [members[index] for index in held], gap=largest if dense[url] else affordable, largest=largest
        )
        spans += [replace(span, members=tuple(held[position] for position in span.members)) for span in merged]
    return spans


def _is_dense(members: Sequence[Member]) -> bool:
    reach = wanted = 0
    for member in sorted(members, key=lambda member: (member.start, member.end)):
        wanted += max(0, member.end - max(member.start, reach))
        reach = max(reach, member.end)
    return wanted > DENSE * (reach - min(member.start for member in members))


def _affordable_gap(members: Sequence[Member], spare: int, largest: int) -> int:
    """The length of gap up to which all gaps together cost no more than `spare` bytes, and none more than `largest`."""
    gaps: list[int] = []
    url, reach = "", 0
    for member in sorted(members, key=lambda member: (member.zip_url, member.start, member.end)):
        if member.zip_url == url and reach < member.start <= reach + largest:
            gaps.append(member.start - reach)
        reach = max(reach, member.end) if member.zip_url == url else member.end
        url = member.zip_url
    gaps.sort()
    spent = 0
    for number, found in enumerate(gaps):
        spent += found
        if spent > spare:
            return max((length for length in gaps[:number] if length < found), default=0)
    return largest


def read_members(
    members: Sequence[Member], *, anonymous: bool = False, spare: int = SPARE_BYTES, meter: Meter = PROCESS
) -> list[bytes | MemberError]:
    """Fetch members by as few ranges as is sensible; a damaged one is a result, not an error.

    One that does not have the length or the CRC that its directory tells is fetched again, by itself, before it is
    called damaged: its bytes may have been wrong on the way.

    Args:
        members: of zips on one file system.
        anonymous: S3 requests are not signed.
        spare: bytes that may be read for nothing to save requests (see `plan_reads`).
        meter: counts requests and bytes.

    Returns:
        Each member's bytes, or why it could not be had, in the order given.

    Raises:
        StorageError: a zip is gone, or cannot be read after several attempts.
    """
    results: list[bytes | MemberError] = [MemberError("not read")] * len(members)
    wanted = [index for index, member in enumerate(members) if max(member.size, member.compressed) <= MEMBER_BYTES]
    for index in set(range(len(members))) - set(wanted):
        results[index] = MemberError(f"{members[index].size} bytes, more than a mask may have ({MEMBER_BYTES})")
    spans = plan_reads([members[index] for index in wanted], spare=spare)
    _read_spans(spans, members, wanted, results, anonymous, meter)
    for _ in range(REPEATS):
        damaged = [index for index in wanted if isinstance(results[index], MemberError)]
        alone = [Span(members[i].zip_url, members[i].start, members[i].end, (n,)) for n, i in enumerate(damaged)]
        _read_spans(alone, members, damaged, results, anonymous, meter)
    return results


def _read_spans(
    spans: Sequence[Span],
    members: Sequence[Member],
    wanted: Sequence[int],
    results: list[bytes | MemberError],
    anonymous: bool,
    meter: Meter,
) -> None:
    """Read spans, whose `members` are positions in `wanted`, and put what they hold into `results`."""
    requests = [Request(Location(span.zip_url, anonymous), span.start, span.end) for span in spans]
    for span, data in zip(spans, fetch(requests, meter), strict=True):
        if isinstance(data, Refusal):
            raise StorageError(f"{span.zip_url}: {data.reason}, though its directory was read: has it been replaced?")
        view = memoryview(data)
        for index in (wanted[position] for position in span.members):
            member = members[index]
            try:
                results[index] = extract(view[member.start - span.start : member.end - span.start], member)
            except MemberError as error:
                results[index] = error
