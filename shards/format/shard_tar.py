"""A shard as a tar: samples are packed into it, and the members of a sample are cut out of its bytes.

A shard is ustar (POSIX.1-1988): blocks of 512 bytes, a header before each member, zeros after the last. The bytes are
those of webdataset's `TarWriter` with a fixed mtime, which a test compares. webdataset itself is not used, because
importing it imports torch, which costs each process of a build one second and 500 MB.
"""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from isal import isal_zlib as zlib

from shards.common.errors import SampleError
from shards.format.dataset import VERSION, Shard
from shards.format.index_schema import IndexRow
from shards.format.sample import KEY, Sample

BLOCK = 512  # bytes of a header; members are padded to a multiple


@dataclass(frozen=True)
class PackedShard:
    """A shard in memory: its bytes, its entry for `dataset.json` and its rows for the index."""

    data: bytes = field(repr=False)
    shard: Shard
    rows: tuple[IndexRow, ...]


def shard_path(split: str, number: int) -> str:
    """Return the path of a split's `number`-th shard under the root, such as `train/000000.tar`."""
    return f"{split}/{number:06d}.tar"


def seeded_order(image_ids: Iterable[str], seed: int) -> list[str]:
    """Sort images as a split stores them, by a seeded hash: the first n are a random sample, for any n."""

    def rank(image_id: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=16).digest(), image_id

    return sorted(image_ids, key=rank)


def pack_shard(samples: Iterable[Sample], *, split: str, path: str) -> PackedShard:
    """Pack samples into one tar, in the order given; the same samples give the same bytes.

    The tar is built in memory, because object stores take an object whole or not at all; the caller limits its size by
    the samples that it passes. A SampleError is raised if one cannot be stored (see `Sample.to_members`).
    """
    buffer = io.BytesIO()
    spans: list[tuple[Sample, int, int]] = []
    version = VERSION
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            start, version = tar.offset, max(version, sample.version)
            for extension, data in sample.to_members().items():
                tar.addfile(member_header(f"{sample.image_id}.{extension}", len(data)), io.BytesIO(data))
            spans.append((sample, start, tar.offset))
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them for reading back
    whole = buffer.getvalue()
    view = memoryview(whole)
    rows = tuple(index_row(sample, split, path, start, view[start:end]) for sample, start, end in spans)
    shard = Shard(path, split, len(rows), len(whole), hashlib.sha256(whole).hexdigest(), version)
    return PackedShard(whole, shard, rows)


def index_row(sample: Sample, split: str, path: str, offset: int, data: bytes | memoryview) -> IndexRow:
    """Return the index row of a sample whose bytes are `data`, at `offset` of the shard `path`."""
    instances = Counter(instance.category_id for instance in sample.instances)
    masks = Counter(instance.category_id for instance in sample.instances if instance.source_mask is not None)
    predicted = Counter(instance.category_id for instance in sample.instances if instance.prediction is not None)
    groups = Counter(instance.category_id for instance in sample.instances if instance.is_group_of)
    classes = tuple(sorted(instances))
    return IndexRow(
        image_id=sample.image_id,
        split=split,
        shard=path,
        offset=offset,
        nbytes=len(data),
        crc32=zlib.crc32(data),
        width=sample.width,
        height=sample.height,
        classes=classes,
        instances=tuple(instances[c] for c in classes),
        masks=tuple(masks[c] for c in classes),
        groups=tuple(groups[c] for c in classes),
        predicted=tuple(predicted[c] for c in classes) if predicted else (),
    )


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a member's header that the format uses."""

    key: str  # part of the name before the first dot; "", like `extension`, if no sample can have that name
    extension: str
    name: str
    size: int  # bytes of the member, without padding
    canonical: bool  # whether the header is, bit for bit, the one that the format specifies

    @property
    def padded(self) -> int:
        """Bytes of the member with padding."""
        return _padded(self.size)


def parse_header(block: bytes | memoryview) -> Header | None:
    """Parse a header of 512 bytes; None for zeros, which end a tar; ValueError if it is no header or damaged."""
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
    except ValueError:  # a name that ustar cannot store, from another kind of tar
        canonical = False
    return Header(key, extension, found.name, found.size, canonical)


def parse_members(data: bytes | memoryview, image_id: str, *, where: str) -> dict[str, memoryview]:
    """Return the members of one sample by extension, as views of `data`: its bytes, as delimited by the index.

    Only the name and size of the format's own headers are parsed: `tarfile` takes ten times as long, for every sample
    of a training (`benchmarks/reads.py`). A SampleError, with the shard `where`, is raised for members of another one.
    """
    view = memoryview(data)
    members: dict[str, memoryview] = {}
    position = 0

    def fault(what: str) -> SampleError:
        return SampleError(f"{where}: {what}: build the dataset again")

    while position < len(view) and view[position]:
        found = _name_and_size(bytes(view[position : position + BLOCK]))
        if found is None:
            raise fault(f"sample {image_id}: no tar header of a plain file at its byte {position}")
        name, size = found
        key, _, extension = name.partition(".")
        if key != image_id:
            raise fault(f"found {name} where the index has {image_id}")
        start = position + BLOCK
        members[extension] = view[start : start + size]
        if (there := len(members[extension])) != size:
            raise fault(f"{name} has {size} bytes, {there} of them are in the range of the index")
        position = start + _padded(size)
    return members


def member_header(name: str, size: int) -> tarfile.TarInfo:
    """Return the header of a member: mode 0444; mtime, owner and group 0 without names."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _name_and_size(header: bytes) -> tuple[str, int] | None:
    """Parse the ustar header of a plain file whose name has no prefix; None for anything else."""
    if len(header) != BLOCK or header[257:262] != b"ustar" or header[156] not in b"0\0" or header[345]:
        return None
    try:
        # The sum of its bytes, with spaces in place of the checksum itself.
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != _octal(header[148:156]):
            return None
        return header[:100].partition(b"\0")[0].decode("ascii"), _octal(header[124:136])
    except ValueError:
        return None


def _octal(digits: bytes) -> int:
    return int(digits.partition(b"\0")[0], 8)
