"""The deterministic tar writer: index rows and a sha256 come out with the bytes.

The bytes are those of webdataset's `TarWriter` with a fixed mtime, which a test compares. The standard library's
`tarfile`, on which it is built, is used directly: importing webdataset imports torch, which costs each process of a
build one second and 500 MB. A shard is built in memory and handed over whole, since object stores take an object whole
or not at all; its size is bounded by the samples that the caller puts in.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from shards.format.dataset import IndexRow, Shard
from shards.format.sample import Sample
from shards.format.tar_members import member_header


@dataclass(frozen=True)
class PackedShard:
    """A shard in memory: its bytes, its entry for `dataset.json` and its rows for the index."""

    data: bytes
    shard: Shard
    rows: tuple[IndexRow, ...]


def shard_path(split: str, number: int) -> str:
    """The path of a split's `number`-th shard below the root: `train/000000.tar`."""
    return f"{split}/{number:06d}.tar"


def pack_shard(samples: Iterable[Sample], *, split: str, path: str) -> PackedShard:
    """Write samples into one tar, in the order given.

    The same samples give the same bytes, on any machine and at any time.

    Raises:
        SampleError: a sample that cannot be stored (see `Sample.to_members`).
    """
    buffer = io.BytesIO()
    spans: list[tuple[Sample, int, int]] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            start = tar.offset
            for extension, data in sample.to_members().items():
                tar.addfile(member_header(f"{sample.image_id}.{extension}", len(data)), io.BytesIO(data))
            spans.append((sample, start, tar.offset))
            tar.members.clear()  # type: ignore[attr-defined]  # kept by tarfile for reading back, which nobody does
    whole = buffer.getvalue()
    view = memoryview(whole)
    rows = tuple(index_row(sample, split, path, start, view[start:end]) for sample, start, end in spans)
    shard = Shard(path, split, len(rows), len(whole), hashlib.sha256(whole).hexdigest())
    return PackedShard(whole, shard, rows)


def index_row(sample: Sample, split: str, path: str, offset: int, data: bytes | memoryview) -> IndexRow:
    """The row of a sample that lies at `offset` of the shard `path` with the bytes `data`."""
    instances = Counter(instance.category_id for instance in sample.instances)
    masks = Counter(instance.category_id for instance in sample.instances if instance.segmentation is not None)
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
    )
