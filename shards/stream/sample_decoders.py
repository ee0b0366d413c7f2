"""What a stream makes of the bytes of a sample, a small tar of its own: a `Sample`, webdataset's dict, or your own.

A `Parse` is called in the loader process with the bytes, the index, the row, and where the dataset lies. It starts from
`shards.format.shard_tar.read_members`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shards.format.index import Index
from shards.format.sample import Sample
from shards.format.selection import with_categories
from shards.format.shard_tar import read_members

Parse = Callable[[memoryview, Index, int, str], Any]


def parse_sample(data: memoryview, index: Index, row: int, where: str = "") -> Sample:
    """The sample as its type.

    Raises:
        SampleError: the range holds another key than the index says, or members in another format.
    """
    image_id, shard = index.image_id(row), _shard(index, row, where)
    sample = Sample.from_members(image_id, read_members(data, image_id, where=shard), where=shard)
    return with_categories(sample, index.category_ids)


def webdataset_sample(data: memoryview, index: Index, row: int, where: str = "") -> dict[str, Any]:
    """The sample as webdataset's dict: `__key__`, and the bytes of each member by its extension.

    The bytes are not looked at. Only where a subset of classes or a mix changes annotations, the JSON is written anew.

    Raises:
        SampleError: the range holds another key than the index says, or is not a tar.
    """
    found: dict[str, Any]
    if index.category_ids is None:
        members = read_members(data, index.image_id(row), where=_shard(index, row, where))
        found = {extension: bytes(value) for extension, value in members.items()}
    else:
        found = dict(parse_sample(data, index, row, where).to_members())
    return {"__key__": index.image_id(row), **found}


def _shard(index: Index, row: int, where: str) -> str:
    return f"{where}/{index.shard_paths[int(index.shard[row])]}"
