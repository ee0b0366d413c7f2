import os
import pickle
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DatasetError
from shards.index import Index, IndexFile
from tests.support import make_index, sample, write_dataset

COUNT = 50_000


def same(one, other):
    arrays = ("shard", "offset", "nbytes", "crc32", "width", "height")
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
        and one.image_ids.equals(other.image_ids)
        and one.shard_paths == other.shard_paths
        and one.fingerprint == other.fingerprint
    )


def answer(pipe, indexes):
    """In another process: what arrived, and whether its memory is that of a file without a name."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:maskstream" in line]
    pipe.send((same(*indexes), indexes[0].image_id(7), len(maps)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="shared memory of this kind is Linux'")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_is_not_forked_shares_the_arrays(method):
    index = make_index(np.arange(1, COUNT + 1)).without_labels()
    context = get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, (index, index)))
    process.start()
    theirs.close()
    assert ours.recv() == (True, f"{7:016x}", 1)
    process.join()
    assert same(pickle.loads(pickle.dumps(index)), index)  # noqa: S301 (by value still, our own bytes)


def test_an_index_can_be_pickled_by_value_whole_or_in_part():
    index = make_index(np.arange(1, 101)).without_labels()
    assert same(pickle.loads(pickle.dumps(index)), index)  # noqa: S301 (our own bytes, made here)
    part = index.take(np.array([3, 50, 99]))
    copy = pickle.loads(pickle.dumps(part))  # noqa: S301
    assert same(copy, part)
    assert [copy.image_id(row) for row in range(3)] == [f"{n:016x}" for n in (3, 50, 99)]


def test_rows_out_of_the_order_of_the_shards_are_refused():
    index = make_index(np.full(10, 5))
    columns = index.labels.columns
    with pytest.raises(DatasetError, match="not in the order of the shards: build the dataset again"):
        Index.read(columns, index.shard_paths[::-1], "s3://bucket/index.parquet")


def test_a_column_is_read_when_it_is_asked_for(tmp_path, monkeypatch):
    dataset = write_dataset(
        tmp_path, {"train": [sample(n) for n in range(9)], "val": [sample(n) for n in range(9, 12)]}
    )
    read = []
    original = IndexFile.__getitem__
    monkeypatch.setattr(IndexFile, "__getitem__", lambda file, name: read.append(name) or original(file, name))
    index = dataset.index("val")
    assert index.image_id(0) == f"{9:016x}"
    assert "classes" not in read
    assert index.counts("images", dataset.categories) == {1: 3, 2: 2}
    assert read.count("classes") == 1
    assert "masks" not in read
