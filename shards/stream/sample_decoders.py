"""Samples in webdataset's form, and functions that make other forms of them: the `parse` of a stream.

webdataset represents a sample as a dict: `__key__`, `__url__` of the shard, and the bytes of each member by its
extension, here `jpg` or `png`, and `json`.
"""

from collections.abc import Callable
from typing import Any

from shards.format.index import Index
from shards.format.sample import Sample
from shards.format.selection import with_categories
from shards.format.shard_tar import parse_members

Parse = Callable[[dict[str, Any]], Any]

# The ids that categories get (`Index.category_ids`), until they are applied to the annotations.
CATEGORY_IDS = "__category_ids__"


def read_sample(data: memoryview, index: Index, row: int, root: str) -> dict[str, Any]:
    """Return a sample as webdataset's dict, with the annotations as they are in the shard.

    `data` is the sample's part of its shard, `root` the URL of the dataset. A SampleError is raised if the bytes have
    another key than the index, or are not a tar.
    """
    key, url = index.image_id(row), f"{root}/{index.shard_paths[int(index.shard[row])]}"
    members = {name: bytes(value) for name, value in parse_members(data, key, where=url).items()}
    sample = {"__key__": key, "__url__": url, **members}
    return sample if index.category_ids is None else {**sample, CATEGORY_IDS: index.category_ids}


def parse_sample(sample: dict[str, Any]) -> Sample:
    """Return a sample of webdataset's form as a `Sample`; a SampleError if it is not in the shard format."""
    parsed = Sample.from_members(sample["__key__"], sample, where=sample.get("__url__", ""))
    return with_categories(parsed, sample.get(CATEGORY_IDS))


def webdataset_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample in webdataset's form: `__key__`, `__url__`, and the bytes of each member by its extension.

    The bytes are those of the shard, except for the JSON of a subset of classes, or of a mix whose class ids differ.
    """
    if CATEGORY_IDS not in sample:
        return sample
    members = parse_sample(sample).to_members()
    return {name: members.get(name, value) for name, value in sample.items() if name != CATEGORY_IDS}
