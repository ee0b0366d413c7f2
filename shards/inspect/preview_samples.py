"""A few samples of a dataset, chosen by a seeded hash through the index alone and read by range requests; no torch.

Which samples are chosen depends on the seed, their keys and classes, not on where they lie: the same dataset with other
shard sizes shows the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.common.errors import DatasetError, SampleError
from shards.format.dataset import Dataset
from shards.format.index import Index
from shards.format.sample import Sample
from shards.format.selection import hash_keys, with_categories
from shards.format.tar_members import BLOCK, parse_header, read_members
from shards.format.validation import check_contents
from shards.storage.explain import explain
from shards.storage.location import Location
from shards.storage.ranges import Read, read_many
from shards.stream.reader import SampleReader


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: its split, and its row in the index of that split."""

    split: str
    row: int


def find(dataset: Dataset, image_id: str) -> Row:
    """The row of a key.

    Raises:
        DatasetError: there is no such sample.
    """
    for split in dataset.splits:
        row = pc.index(dataset.index(split).image_ids, image_id).as_py()
        if row >= 0:
            return Row(split, row)
    raise DatasetError(
        f"{dataset.root}: there is no sample {image_id!r}: keys are ImageIDs such as 0123456789abcdef, without .jpg"
    )


def first_rows(index: Index, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Up to `count` rows, ascending: a random sample of a split, in which each of its samples is as likely."""
    order = np.argsort(hash_keys(index.image_ids, seed), kind="stable")
    return np.sort(order[:count])


def choose(dataset: Dataset, count: int, seed: int = 0) -> list[Row]:
    """Up to `count` samples of all splits in which every class has its share.

    The pairs of a split and a class take turns, and each gives its samples in the order of the hash. So a rare class is
    there as often as a frequent one, which a random sample would not do. Samples without a class take their turn too.
    """
    starts_of = [0]  # of each split, in the numbers that samples have here
    keys, strata, samples = [], [], []
    wanted = np.array([category.id for category in dataset.categories], np.int64)
    for number, split in enumerate(dataset.splits):
        index = dataset.index(split)
        assert index.labels is not None, "an index of a dataset has labels"
        has = np.isin(index.labels.classes, wanted)
        classes, of = index.labels.classes[has].astype(np.int64), index.labels.samples[has]
        bare = np.setdiff1d(np.arange(len(index)), of)  # class 0 stands for none
        strata.append(number * (wanted.max(initial=0) + 1) + np.concatenate((classes, np.zeros(len(bare), np.int64))))
        samples.append(starts_of[-1] + np.concatenate((of, bare)))
        keys.append(hash_keys(index.image_ids, seed))
        starts_of.append(starts_of[-1] + len(index))
    if not starts_of[-1]:
        return []
    key, stratum, sample = np.concatenate(keys), np.concatenate(strata), np.concatenate(samples)
    order = np.lexsort((key[sample], stratum))
    stratum, sample = stratum[order], sample[order]
    starts = np.flatnonzero(np.diff(stratum, prepend=-1))
    sizes = np.diff(starts, append=len(stratum))
    turn = np.arange(len(stratum)) - np.repeat(starts, sizes)
    in_turn = sample[np.lexsort((np.repeat(key[sample[starts]], sizes), turn))]
    _, first = np.unique(in_turn, return_index=True)
    chosen = in_turn[np.sort(first)[:count]]
    splits = np.searchsorted(starts_of, chosen, side="right") - 1
    return [Row(dataset.splits[split], int(number - starts_of[split])) for split, number in zip(splits, chosen)]


def read_samples(dataset: Dataset, rows: Sequence[Row]) -> Iterator[tuple[Row, Sample]]:
    """The samples of some rows, split after split, each as its index row says (crc32), and fit to be drawn.

    Raises:
        SampleError: a sample cannot be had, is not what the index says, or has a fault that `--verify` tells.
    """
    categories = frozenset(category.id for category in dataset.info.categories)
    for split in dataset.splits:
        index = dataset.index(split)
        reader = SampleReader(dataset.root, index)
        for row, data in reader.read(item.row for item in rows if item.split == split):
            where, image_id = str(dataset.root / index.shard_paths[int(index.shard[row])]), index.image_id(row)
            sample = Sample.from_members(image_id, read_members(data, image_id, where=where), where=where)
            check_contents(sample, categories, where)
            yield Row(split, row), with_categories(sample, index.category_ids)


def read_annotations(root: Location, index: Index, rows: NDArray[np.int64]) -> list[Sample]:
    """Samples of a split without their pictures (`image` is empty): two small requests each, and no check of a hash.

    Args:
        root: of the dataset.
        index: of the split.
        rows: in the index.

    Raises:
        SampleError: a sample cannot be had or is not what the format says.
    """
    shards = [root / index.shard_paths[int(index.shard[row])] for row in rows]
    starts = [int(index.offset[row]) for row in rows]
    ends = [int(index.offset[row] + index.nbytes[row]) for row in rows]
    keys = [index.image_id(row) for row in rows]

    def received(reads: list[Read]) -> Iterator[bytes]:
        for read, key, answer in zip(reads, keys, read_many(reads)):
            if isinstance(answer, Exception):
                reason = explain(answer, str(read.location)) or repr(answer)
                raise SampleError(f"{read.location}: sample {key}: cannot be read: {reason}") from answer
            yield answer

    tails = []
    headers = received([Read(shard, start, start + BLOCK) for shard, start in zip(shards, starts)])
    for shard, start, end, key, block in zip(shards, starts, ends, keys, headers):
        try:
            header = parse_header(block)
        except ValueError as error:
            raise SampleError(f"{shard}: sample {key} at offset {start}: no tar header ({error})") from error
        skipped = BLOCK + (header.padded if header is not None else 0)
        tails.append(Read(shard, min(start + skipped, end), end))
    samples = [
        Sample.from_members(key, {"jpg": b"", **read_members(data, key, where=str(shard))}, where=str(shard))
        for shard, key, data in zip(shards, keys, received(tails))
    ]
    return [with_categories(sample, index.category_ids) for sample in samples]
