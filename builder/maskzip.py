"""Members of remote zips by coalesced range reads: no zip is downloaded whole.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (4.3.7 local headers, 4.4.5 methods). The standard
library reads end records and central directories, ZIP64 included; the members are cut out here.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from builder.fetch import RangeFile, Refusal, Request, fetch
from builder.plan import Member
from shards.errors import StorageError, UserError
from shards.storage import Location

TAIL_BYTES = 66 << 10  # end record, its longest comment (64 KiB), and the ZIP64 records
GAP_BYTES = 16 << 10  # reading so much for nothing costs less than another request
SPAN_BYTES = 8 << 20  # the largest merged read
MEMBER_BYTES = 64 << 20  # the largest member, compressed or not, that is believed to be a mask

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LONGEST_HEADER = _LOCAL_HEADER.size + 2 * 0xFFFF
_DESCRIPTOR_BYTES = 24


class MemberError(Exception):
    """A member that is not what its zip's directory says; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `end` of one zip, which hold the members at `members` (positions in the list planned for)."""

    zip_url: str
    start: int
    end: int
    members: tuple[int, ...]


def locate_members(location: Location, names: Collection[str]) -> dict[str, Member]:
    """Look files up in a zip's central directory; names that it does not hold are left out.

    Costs about three requests: the length, the end, and the directory where it is longer than `TAIL_BYTES`.

    Raises:
        UserError: not a zip, or a damaged one.
        StorageError: it is missing or cannot be read.
    """
    try:
        with zipfile.ZipFile(RangeFile(location, tail=TAIL_BYTES)) as archive:
            starts = sorted(info.header_offset for info in archive.infolist())
            following = dict(zip(starts, [*starts[1:], archive.start_dir]))
            found = [archive.NameToInfo[name] for name in names if name in archive.NameToInfo]
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise UserError(f"{location}: not a zip that can be read ({error}): check --annotations") from error
    return {
        info.filename: Member(
            zip_url=location.url,
            name=info.filename,
            start=info.header_offset,
            # What lies between a member and the next header is its own, but for zips with holes.
            end=min(
                following[info.header_offset],
                info.header_offset + _LONGEST_HEADER + info.compress_size + _DESCRIPTOR_BYTES,
            ),
            method=info.compress_type,
            crc32=info.CRC,
            compressed=info.compress_size,
            size=info.file_size,
        )
        for info in found
    }


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


def read_members(members: Sequence[Member], *, anonymous: bool = False) -> tuple[list[bytes | MemberError], int]:
    """Fetch members by as few ranges as is sensible; a damaged one is a result, not an error.

    Args:
        members: of zips on one file system.
        anonymous: S3 requests are not signed.

    Returns:
        Each member's bytes, or why it could not be had, in the order given; and the number of bytes fetched.

    Raises:
        StorageError: a zip is gone, or cannot be read after several attempts.
    """
    results: list[bytes | MemberError] = [MemberError("not read")] * len(members)
    wanted = [index for index, member in enumerate(members) if max(member.size, member.compressed) <= MEMBER_BYTES]
    for index in set(range(len(members))) - set(wanted):
        results[index] = MemberError(f"{members[index].size} bytes, more than a mask may have ({MEMBER_BYTES})")
    spans = merge_spans([members[index] for index in wanted])
    requests = [Request(Location(span.zip_url, anonymous), span.start, span.end) for span in spans]
    fetched = 0
    for span, data in zip(spans, fetch(requests), strict=True):
        if isinstance(data, Refusal):
            raise StorageError(f"{span.zip_url}: {data.reason}, though its directory was read: has it been replaced?")
        fetched += len(data)
        view = memoryview(data)
        for index in (wanted[position] for position in span.members):
            member = members[index]
            try:
                results[index] = extract(view[member.start - span.start : member.end - span.start], member)
            except MemberError as error:
                results[index] = error
    return results, fetched
