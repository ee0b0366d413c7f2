"""The members of a sample, cut out of a shard's bytes without webdataset, which imports torch.

A shard is ustar (POSIX.1-1988): blocks of 512 bytes, a header before each member, zeros after the last.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass

from shards.common.errors import SampleError
from shards.format.sample import KEY

BLOCK = 512  # bytes; headers have one, members are padded to whole ones


@dataclass(frozen=True, slots=True)
class Header:
    """What the format needs of a member's header.

    Attributes:
        key, extension: the two parts of its name; both "" for a name that no sample can have.
        name: as the header has it.
        size: bytes of the member, without its padding.
        canonical: whether the header is, bit for bit, the one that the format asks for.
    """

    key: str
    extension: str
    name: str
    size: int
    canonical: bool

    @property
    def padded(self) -> int:
        """Bytes that the member takes after its header."""
        return -(-self.size // BLOCK) * BLOCK


def member_header(name: str, size: int) -> tarfile.TarInfo:
    """The header of a member: mode 0444, mtime, owner and group 0 without names."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member


def parse_header(block: bytes | memoryview) -> Header | None:
    """Read one header of 512 bytes; None for a block of zeros, which ends a tar.

    Raises:
        ValueError: it is not a header, or its checksum is wrong.
    """
    block = bytes(block)
    if block.count(0) == BLOCK:
        return None
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except tarfile.HeaderError as error:
        raise ValueError(str(error) or "not a tar header") from error
    key, _, extension = found.name.partition(".")
    if not KEY.fullmatch(key):
        key = extension = ""
    expected = member_header(found.name, found.size)
    try:
        canonical = expected.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict") == block
    except ValueError:  # a name that ustar cannot hold, from another kind of tar
        canonical = False
    return Header(key, extension, found.name, found.size, canonical)


def read_members(data: bytes | memoryview, image_id: str, *, where: str) -> dict[str, memoryview]:
    """The members of one sample by extension, as they lie in `data`: nothing is copied.

    It reads the name and size that the format's headers have. `tarfile`, which knows all that was ever called tar,
    takes ten times as long (`benchmarks/reads.py`), and training needs this of every sample.

    Args:
        data: the sample's bytes, as its index row bounds them.
        image_id: its key.
        where: the shard, which errors name.

    Raises:
        SampleError: the bytes are not members of this sample.
    """
    view = memoryview(data)
    members: dict[str, memoryview] = {}
    position = 0
    while position < len(view) and view[position]:
        found = _name_and_size(bytes(view[position : position + BLOCK]))
        if found is None:
            raise SampleError(
                f"{where}: sample {image_id}: no tar header of a plain file at its byte {position}: "
                "build the dataset again"
            )
        name, size = found
        key, _, extension = name.partition(".")
        if key != image_id:
            raise SampleError(f"{where}: {name} lies where the index has {image_id}: build the dataset again")
        start = position + BLOCK
        members[extension] = view[start : start + size]
        if len(members[extension]) != size:
            raise SampleError(
                f"{where}: {name} has {size} bytes, {len(members[extension])} of them are in the range of the index: "
                "build the dataset again"
            )
        position = start + -(-size // BLOCK) * BLOCK
    return members


def _name_and_size(header: bytes) -> tuple[str, int] | None:
    """Of the plain file that a header of ustar describes, without a prefix to its name; None for anything else."""
    if len(header) != BLOCK or header[257:262] != b"ustar" or header[156] not in b"0\0" or header[345]:
        return None
    try:
        # The sum of its bytes, with spaces in place of the sum itself.
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != _octal(header[148:156]):
            return None
        return header[:100].partition(b"\0")[0].decode("ascii"), _octal(header[124:136])
    except ValueError:
        return None


def _octal(digits: bytes) -> int:
    return int(digits.partition(b"\0")[0], 8)
