"""Members of remote zips by coalesced range reads: no zip is downloaded whole.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (4.3.7 local headers, 4.4.5 methods). The standard
library reads end records and central directories, ZIP64 included; the members are extracted here.
"""

import logging
import struct
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import BoundedSemaphore
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
from isal import isal_zlib as zlib

from builder.fetching.fetch import Inventory, RangeFile, Refusal, Request, fetch
from builder.fetching.table_cache import NO_CACHE, Cache, Content
from builder.fetching.traffic import PROCESS, Meter
from builder.tasks.plan import Member
from shards.commands.progress import Progress
from shards.common.back_off import DAMAGED_READS
from shards.common.errors import StorageError, UserError
from shards.common.text import counted
from shards.storage.location import Location

ZIPS_AT_ONCE = 16  # zips whose ends are requested; Open Images has 16 per split
ZIPS_IN_MEMORY = 4  # the directory of a train zip of Open Images takes about 100 MB in memory while it is read
TAIL_BYTES = 66 << 10  # end record, its longest comment (64 KiB), and the ZIP64 records
GAP_BYTES = 16 << 10  # reading this many unwanted bytes costs less than another request
SPAN_BYTES = 8 << 20  # the largest merged read
SPARE_BYTES = 1 << 20  # unwanted bytes that may be read in all, by default
DENSE = 2 / 3  # a stretch of which more than this share is wanted is read whole
MIN_WANTED = 8  # files; that fewer are missing proves nothing about their zip
MEMBER_BYTES = 64 << 20  # the largest size, compressed or not, of a member that may be a mask

logger = logging.getLogger(__name__)

# The fields of a `Member`, without its zip.
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

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LONGEST_HEADER = _LOCAL_HEADER.size + 2 * 0xFFFF
_DESCRIPTOR_BYTES = 24


class MemberError(Exception):
    """A member that is not what its zip's directory says; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `end` of a zip, and the members in them."""

    zip_url: str
    start: int
    end: int
    members: tuple[Member, ...]


def locate_members(
    wanted: Mapping[Location, Collection[str]], *, cache: Cache = NO_CACHE, inventory: Inventory | None = None
) -> dict[str, Member]:
    """Look up files in the central directories of zips; names that no zip holds are left out.

    The files may all be in one folder of a zip, as in one that was unpacked and zipped again. Costs about two requests
    per zip, and another one if a directory is longer than `TAIL_BYTES`.

    Args:
        wanted: Zip -> the names to look up in it; no name is looked up in two zips.
        cache: Keeps whole directories.
        inventory: Knows the versions of the zips to read.

    Raises:
        UserError: Not a zip, or a damaged one; or none of the files is in the zips, as far as that is no coincidence.
        StorageError: A zip is missing, cannot be read, or was replaced while it was being read.
    """
    inventory = inventory or Inventory()
    inventory.load(list(wanted))
    in_memory = BoundedSemaphore(ZIPS_IN_MEMORY)

    def look_up(location: Location) -> _LookUp:
        content = Content(location, inventory.of(location), "zip directory", DIRECTORY)
        select = partial(_LookUp.of, wanted[location])
        with in_memory:
            found = cache.read(content, select)
        if found is None:
            file = RangeFile(location, content.description, -TAIL_BYTES, TAIL_BYTES)
            with in_memory:
                found = select(cache.keep(content, _read_directory(file)))
        return found

    found = dict[Location, _LookUp]()
    with (
        ThreadPoolExecutor(ZIPS_AT_ONCE) as pool,
        Progress("reading zip directories", len(wanted), "zips", logger.info) as progress,
    ):
        for location, one in zip(wanted, pool.map(look_up, wanted), strict=True):
            found[location] = one
            progress.advance(1)
    empty = [location for location, one in found.items() if not one.rows]
    if len(empty) < len(found):  # a few files may be missing from a zip that is the right one
        empty = [location for location in empty if len(wanted[location]) >= MIN_WANTED]
    wrong = [location for location, one in found.items() if one.scattered]
    if not wrong and sum(len(wanted[location]) for location in empty) >= MIN_WANTED:
        wrong = empty
    if wrong:
        raise _nothing_found(wrong[0], sorted(wanted[wrong[0]]), found[wrong[0]])
    return {
        name: Member(zip_url=location.url, **row) for location, one in found.items() for name, row in one.rows.items()
    }


@dataclass(frozen=True)
class _LookUp:
    """What a zip has of the wanted files.

    Attributes:
        rows: rows of its directory by name; none if the files are `scattered` over several folders.
        files: the number of all its files, such as `example`.
    """

    rows: dict[str, dict[str, Any]]
    scattered: bool
    files: int
    example: str

    @classmethod
    def of(cls, names: Collection[str], tables: Iterable[pa.Table]) -> Self:
        """Look up files by their names at the top of a zip, or else in the one folder that has any of them."""
        wanted = pa.array(sorted(names), pa.string())
        folders: dict[str, dict[str, dict[str, Any]]] = {}
        files, example = 0, ""
        for table in tables:
            own_names = table["name"]
            if pc.any(pc.match_substring(own_names, "/")).as_py():
                own_names = pc.replace_substring_regex(own_names, "^.*/", "")
            for row in table.filter(pc.is_in(own_names, value_set=wanted)).to_pylist():
                folder, _, name = row["name"].rpartition("/")
                folders.setdefault(folder, {})[name] = row
            files += table.num_rows
            example = example or next(iter(table["name"].slice(table.num_rows // 2, 1).to_pylist()), "")
        folders = {folder: rows for folder, rows in folders.items() if "" not in folders or not folder}
        return cls(next(iter(folders.values())) if len(folders) == 1 else {}, len(folders) > 1, files, example)


def _nothing_found(location: Location, wanted: Sequence[str], found: _LookUp) -> UserError:
    holds = f"{counted(found.files, 'file')}, such as {found.example!r}" if found.files else "no file"
    return UserError(
        f"{location}: it holds {holds}, and none of the {counted(len(wanted), 'mask')} looked for, such as "
        f"{wanted[0]!r}: check --annotations (masks must be at the top of a zip, or all in one folder)"
    )


def _read_directory(file: RangeFile) -> Iterator[pa.Table]:
    """Yield all members as one table, in the order of the directory; of repeated names the last, as `zipfile` does."""
    try:
        with zipfile.ZipFile(file) as archive:
            starts = sorted(info.header_offset for info in archive.infolist())
            following = dict(zip(starts, [*starts[1:], archive.start_dir]))
            infos = list(archive.NameToInfo.values())
        # A member ends before the next header, and earlier in a zip with holes.
        longest = [_LONGEST_HEADER + info.compress_size + _DESCRIPTOR_BYTES for info in infos]
        starts = [info.header_offset for info in infos]
        columns = {
            "name": [info.filename for info in infos],
            "start": starts,
            "end": [min(following[start], start + length) for start, length in zip(starts, longest, strict=True)],
            "method": [info.compress_type for info in infos],
            "crc32": [info.CRC for info in infos],
            "compressed": [info.compress_size for info in infos],
            "size": [info.file_size for info in infos],
        }
        table = pa.table(columns, schema=DIRECTORY)
    # Damage can also be in a name (not UTF-8), the version that a member needs, or a number (more than 63 bits).
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, OverflowError) as error:
        raise UserError(f"{file.location}: not a readable zip ({error}): check --annotations") from error
    file.check_unchanged()
    yield table


def plan_reads(members: Sequence[Member], *, spare: int, gap: int = GAP_BYTES, largest: int = SPAN_BYTES) -> list[Span]:
    """Merge members of any zips into ranges so that few unwanted bytes are read.

    If more than `DENSE` of the stretch from a zip's first wanted member to its last is wanted, the stretch is read in
    consecutive ranges, which adds less than half of the wanted bytes. In other zips, gaps of up to `gap` bytes are
    read, the shortest first, until they have cost `spare` bytes over all zips.

    Returns:
        Spans of at most `largest` bytes, except for a longer member, in the order (zip, start). Each member is in one.
    """
    zips: dict[str, list[Member]] = {}
    for member in sorted(members, key=lambda member: (member.zip_url, member.start, member.end)):
        zips.setdefault(member.zip_url, []).append(member)
    gaps = {url: _gaps(wanted) for url, wanted in zips.items()}
    dense = {url: _is_dense(wanted, sum(gaps[url])) for url, wanted in zips.items()}
    affordable = _affordable_gap([length for url in zips if not dense[url] for length in gaps[url]], spare, gap)
    return [
        span for url, wanted in zips.items() for span in _merge(wanted, largest if dense[url] else affordable, largest)
    ]


def _merge(members: Sequence[Member], gap: int, largest: int) -> list[Span]:
    """Merge the members of one zip, in order, across gaps of up to `gap` bytes."""
    spans: list[Span] = []
    for member in members:
        last = spans[-1] if spans else None
        end = member.end if last is None else max(last.end, member.end)
        if last is not None and member.start - last.end <= gap and end - last.start <= largest:
            spans[-1] = Span(last.zip_url, last.start, end, (*last.members, member))
        else:
            spans.append(Span(member.zip_url, member.start, member.end, (member,)))
    return spans


def _gaps(members: Sequence[Member]) -> list[int]:
    """Return the lengths of the stretches between the members of one zip, given in order."""
    gaps = []
    reach = members[0].end
    for member in members[1:]:
        if member.start > reach:
            gaps.append(member.start - reach)
        reach = max(reach, member.end)
    return gaps


def _is_dense(members: Sequence[Member], unwanted: int) -> bool:
    stretch = max(member.end for member in members) - members[0].start
    return stretch - unwanted > DENSE * stretch


def _affordable_gap(gaps: Iterable[int], spare: int, longest: int) -> int:
    """Return the length, at most `longest`, up to which all gaps together cost no more than `spare` bytes."""
    affordable = spent = 0
    for length, count in sorted(Counter(length for length in gaps if length <= longest).items()):
        spent += length * count
        if spent > spare:
            return affordable
        affordable = length
    return longest


def read_members(
    members: Sequence[Member], *, anonymous: bool = False, spare: int = SPARE_BYTES, meter: Meter = PROCESS
) -> list[bytes | MemberError]:
    """Fetch and extract members of zips on one file system, in order; a damaged one is a result, not an error.

    A member without the length or the CRC that its directory states is fetched again, by itself: the transfer may have
    damaged it. `spare` is explained in `plan_reads`. StorageError if a zip is gone or cannot be read.
    """
    results: dict[Member, bytes | MemberError] = {
        member: MemberError(f"{member.size} bytes, more than a mask may have ({MEMBER_BYTES})") for member in members
    }
    wanted = [member for member in members if max(member.size, member.compressed) <= MEMBER_BYTES]
    spans = plan_reads(wanted, spare=spare)
    for _ in range(DAMAGED_READS):
        results |= _read_spans(spans, anonymous, meter)
        damaged = [m for span in spans for m in span.members if isinstance(results[m], MemberError)]
        spans = [Span(member.zip_url, member.start, member.end, (member,)) for member in damaged]
    return [results[member] for member in members]


def _read_spans(spans: Sequence[Span], anonymous: bool, meter: Meter) -> dict[Member, bytes | MemberError]:
    requests = [Request(Location(span.zip_url, anonymous), span.start, span.end) for span in spans]
    results: dict[Member, bytes | MemberError] = {}
    for span, data in zip(spans, fetch(requests, meter), strict=True):
        if isinstance(data, Refusal):
            raise StorageError(f"{span.zip_url}: {data.reason}, though its directory was read: has it been replaced?")
        view = memoryview(data)
        for member in span.members:
            try:
                results[member] = extract(view[member.start - span.start : member.end - span.start], member)
            except MemberError as error:
                results[member] = error
    return results


def extract(data: bytes | memoryview, member: Member) -> bytes:
    """Return the uncompressed bytes of a member, given its data from the local header on; MemberError if damaged."""
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
        except zlib.error as error:  # type: ignore[misc]  # a class, which its stub does not say
            raise MemberError(f"cannot be inflated: {error}") from error
    else:
        raise MemberError(f"compression method {member.method} is not supported")
    if len(content) != member.size:
        raise MemberError(f"its length is not the {member.size} bytes that the directory says")
    if zlib.crc32(content) != member.crc32:
        raise MemberError("its CRC is not the one in the directory")
    return content
