"""A few samples of a dataset, chosen by a seeded hash of their keys and fetched by range requests.

The choice does not depend on positions: a dataset that is built again with another shard size shows the same samples.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.common.errors import DatasetError, SampleError
from shards.format.dataset import Dataset
from shards.format.index import LARGEST_ID, Index
from shards.format.sample import Sample
from shards.format.selection import hash_keys, with_categories
from shards.format.shard_tar import BLOCK, parse_header, parse_members
from shards.format.validation import check_contents
from shards.storage.explain import explain
from shards.storage.location import Location
from shards.storage.reads import Read, read_many
from shards.stream.reader import SampleReader


class Row(NamedTuple):
    """One sample: its split, and its row in the index of that split."""

    split: str
    row: int


def find(dataset: Dataset, image_id: str) -> Row:
    """Return the row of a sample; raises DatasetError if no split has it."""
    for split in dataset.splits:
        row = pc.index(dataset.index(split).image_ids, image_id).as_py()
        if row >= 0:
            return Row(split, row)
    hint = "keys are ImageIDs such as 0123456789abcdef, without .jpg"
    raise DatasetError(f"{dataset.root}: there is no sample {image_id!r}: {hint}")


def first_rows(index: Index, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Return a uniform random sample of up to `count` rows of a split, ascending."""
    order = np.argsort(hash_keys(index.image_ids, seed), kind="stable")
    return np.sort(order[:count])


def choose(dataset: Dataset, count: int, seed: int = 0) -> list[Row]:
    """Choose up to `count` samples of all splits so that rare classes occur as often as frequent ones.

    The samples of each class of each split, and those without a class, wait in a queue in the order of the hash. The
    queues take turns; samples that were chosen before are skipped.
    """
    import pandas as pd

    found = []
    for number, split in enumerate(dataset.splits):
        index = dataset.index(split)
        assert index.labels is not None, "an index of a dataset has labels"
        own = pd.DataFrame({"row": index.labels.samples, "class": index.labels.classes})
        own = own[own["class"].isin([category.id for category in dataset.categories])]
        others = pd.DataFrame({"row": np.setdiff1d(np.arange(len(index)), own["row"]), "class": LARGEST_ID + 1})
        own = pd.concat([own, others]).assign(split=number)
        found.append(own.assign(hash=hash_keys(index.image_ids, seed)[own["row"]]))
    if not found:
        return []
    rows = pd.concat(found).sort_values("hash", kind="stable", ignore_index=True)
    queues = rows.groupby(["split", "class"])
    rows = rows.assign(turn=queues.cumcount(), first=queues["hash"].transform("first"))
    rows = rows.sort_values(["turn", "first", "split", "class"]).drop_duplicates(["split", "row"]).head(count)
    return [Row(dataset.splits[split], row) for split, row in rows[["split", "row"]].itertuples(index=False)]


def read_samples(dataset: Dataset, rows: Sequence[Row]) -> Iterator[tuple[Row, Sample]]:
    """Read samples, split by split; a SampleError for one that does not match the index or that `--verify` rejects."""
    categories = frozenset(category.id for category in dataset.info.categories)
    for split in dataset.splits:
        index = dataset.index(split)
        reader = SampleReader(dataset.root, index)
        for row, data in reader.read(item.row for item in rows if item.split == split):
            where, image_id = str(dataset.root / index.shard_paths[int(index.shard[row])]), index.image_id(row)
            sample = Sample.from_members(image_id, parse_members(data, image_id, where=where), where=where, check=False)
            check_contents(sample, categories, where)
            yield Row(split, row), with_categories(sample, index.category_ids)


def read_annotations(root: Location, index: Index, rows: NDArray[np.int64]) -> list[Sample]:
    """Read samples of a split without their pictures: `image` is empty, and the crc32 is not checked.

    Each takes two small requests: the header of the image, whose size says where the JSON begins, and the JSON. A
    SampleError is raised for one that cannot be read or is not in the shard format.
    """
    keys = [index.image_id(row) for row in rows]
    shards = [root / index.shard_paths[shard] for shard in index.shard[rows].tolist()]
    starts, ends = index.offset[rows].tolist(), (index.offset[rows] + index.nbytes[rows]).tolist()
    tails, samples = [], []
    headers = _received([Read(shard, start, start + BLOCK) for shard, start in zip(shards, starts)], keys)
    for shard, start, end, key, block in zip(shards, starts, ends, keys, headers):
        try:
            header = parse_header(block)
        except ValueError as error:
            raise SampleError(f"{shard}: sample {key} at offset {start}: no tar header ({error})") from error
        skipped = BLOCK + (header.padded if header is not None else 0)
        tails.append(Read(shard, min(start + skipped, end), end))
    for shard, key, data in zip(shards, keys, _received(tails, keys)):
        json = parse_members(data, key, where=str(shard))
        sample = Sample.from_members(key, {"jpg": b"", **json}, where=str(shard))
        samples.append(with_categories(sample, index.category_ids))
    return samples


def _received(reads: Sequence[Read], keys: Sequence[str]) -> Iterator[bytes]:
    """Yield the bytes of each read; a SampleError names the first that failed."""
    for read, key, answer in zip(reads, keys, read_many(reads, before_fork=True)):
        if isinstance(answer, Exception):
            reason = explain(answer, str(read.location)) or repr(answer)
            raise SampleError(f"{read.location}: sample {key}: cannot be read: {reason}") from answer
        yield answer
