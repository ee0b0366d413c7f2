import os
import pickle
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shards.common.errors import DatasetError
from shards.format.dataset import open_dataset
from shards.format.index import Index, IndexFile, row_numbers
from shards.format.index_schema import INDEX_SCHEMA
from shards.inspect.verify import Verification
from shards.storage.location import Location
from tests.support import edit_index, make_index, sample, sign_index, write_dataset

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
    """Send back from another process whether the index is the same, and its number of shared memory maps."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:maskstream" in line]
    pipe.send((same(*indexes), indexes[0].image_id(7), len(maps)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memfd needs Linux")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_spawned_process_shares_the_arrays(method):
    index = replace(make_index(np.arange(1, COUNT + 1)), labels=None)
    context = get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, (index, index)))
    process.start()
    sender.close()
    assert receiver.recv() == (True, f"{7:016x}", 1)
    process.join()
    assert same(pickle.loads(pickle.dumps(index)), index)  # noqa: S301 (by value, our own bytes)


def test_an_index_can_be_pickled_whole_or_in_part():
    index = replace(make_index(np.arange(1, 101)), labels=None)
    part = index.take(np.array([3, 50, 99]))
    for one in (index, part, index.take(np.zeros(0, np.int64))):
        assert same(pickle.loads(pickle.dumps(one)), one)  # noqa: S301 (bytes that this test made)
    assert part.image_ids.to_pylist() == [f"{n:016x}" for n in (3, 50, 99)]


def test_the_fingerprint_depends_on_the_samples():
    one, same_again, other = (make_index(lengths).fingerprint for lengths in ([5, 6], [5, 6], [5, 7]))
    assert one == same_again != other


def test_rows_in_another_order_than_the_shards_are_refused():
    index = make_index(np.full(10, 5))
    assert index.labels is not None
    with pytest.raises(DatasetError, match="not in the order of the shards: build the dataset again"):
        Index.read(index.labels.columns, index.shard_paths[::-1])


def test_a_column_is_decoded_when_it_is_used(dataset, monkeypatch):
    read, original = [], IndexFile.__getitem__

    def recorded(file, name):
        read.append(name)
        return original(file, name)

    monkeypatch.setattr(IndexFile, "__getitem__", recorded)
    index = dataset.index("val")
    assert index.image_id(0) == f"{100:016x}"
    assert "classes" not in read
    assert index.counts("images", dataset.categories) == {1: 7, 2: 3}
    assert read.count("classes") == 1
    assert "masks" not in read


def read_all(root):
    dataset = open_dataset(root)
    return [dataset.index("train").counts(name, dataset.categories) for name in ("instances", "masks", "groups")]


def row_with(**values):
    return lambda rows: rows[1].update(values)


NOT_UTF8 = pa.StringArray.from_buffers(3, pa.py_buffer(np.arange(4, dtype=np.int32)), pa.py_buffer(b"0\xff2"))


def with_column(name, values):
    def edit(rows):
        table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
        number = INDEX_SCHEMA.get_field_index(name)
        return table.append_column(name, values) if number < 0 else table.set_column(number, name, values)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (row_with(image_id=None), "column image_id has rows without a value"),
        (row_with(masks=None), "column masks has rows without a value"),
        (row_with(classes=[None, 2]), "column classes has rows without a value"),
        (row_with(classes=[1, 2, 3]), "a row has another number of instances than of classes"),
        (row_with(classes=[-1, 1]), "column classes has ids from -1 to "),
        (row_with(classes=[1, 2**31 - 1]), "column classes has ids from 1 to 2147483647"),
        (row_with(image_id="é"), "column image_id has keys that are not 1 to 64 letters"),
        (row_with(image_id="a" * 65), "column image_id has keys that are not 1 to 64 letters"),
        (with_column("image_id", NOT_UTF8), "is not an index in Parquet ("),
        (row_with(offset=-512), "column offset has -512"),
        (row_with(height=0), "column height has 0"),
        (with_column("width", pa.array([48.0, float("nan"), 48.0])), "column width is double, not int32"),
        (with_column("groups", pa.array([1, 1, 1], pa.int32())), "column groups is int32, not list<"),
        (with_column("predicted", pa.array([1, 1, 1], pa.int32())), "column predicted is int32, not list<"),
        (lambda rows: pa.Table.from_pylist(rows, schema=INDEX_SCHEMA).drop_columns(["groups"]), "no column groups"),
    ],
)
def test_an_index_of_another_form_is_a_one_line_error(tmp_path, edit, message):
    write_dataset(tmp_path, {"train": [sample(n) for n in range(3)]})
    edit_index(tmp_path, edit)
    with pytest.raises(DatasetError) as caught:
        read_all(tmp_path)
    error = str(caught.value)
    assert error.startswith(f"{tmp_path}/index.parquet: ")
    assert message in error
    assert error.endswith(": build the dataset again")
    assert "\n" not in error


def test_an_index_that_is_not_parquet_is_refused(tmp_path):
    write_dataset(tmp_path, {"train": [sample(n) for n in range(3)]})
    whole = (tmp_path / "index.parquet").read_bytes()
    # No footer; and a footer whose pages are zeros.
    for data in (b"garbage", whole[:4] + bytes(len(whole) // 2 - 4) + whole[len(whole) // 2 :]):
        (tmp_path / "index.parquet").write_bytes(data)
        sign_index(tmp_path)
        with pytest.raises(DatasetError, match=r"index\.parquet: is not an index in Parquet \("):
            read_all(tmp_path)


def repeated(table, rows):
    """A table with the first row this many times, which Parquet stores in a few bytes each."""
    return pa.concat_tables([table.slice(0, 1)]).take(pa.array(np.zeros(rows, np.int64)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda table: repeated(table, 60_000), "it has 60000 rows, of 3 samples at most"),
        (
            lambda table: table.set_column(0, "image_id", pa.array(["x" * 2_000_000, "b", "c"])),
            r"it has \d+ bytes for 3 rows",
        ),
    ],
)
def test_an_index_that_unpacks_to_more_than_dataset_json_says_is_refused_unread(tmp_path, monkeypatch, edit, message):
    write_dataset(tmp_path, {"train": [sample(n) for n in range(3)]})
    edit_index(tmp_path, lambda rows: edit(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)))
    with pytest.raises(DatasetError, match=rf"index\.parquet: {message}: build the dataset again"):
        open_dataset(str(tmp_path))
    faults = [str(fault) for part in Verification(Location(str(tmp_path))).run() for fault in part.faults]
    assert any("index.parquet: " in fault for fault in faults)


def test_the_entries_of_lists_may_have_any_name(tmp_path):
    lists = pa.array([[1], [1, 2], [1]], pa.list_(pa.field("element", pa.int32())))
    write_dataset(tmp_path, {"train": [sample(n) for n in range(3)]})
    edit_index(tmp_path, with_column("classes", lists))
    dataset = open_dataset(str(tmp_path))
    assert dataset.index("train").counts("images", dataset.categories) == {1: 3, 2: 1}
    assert dataset.table.num_rows == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 5], "rows are from 0 to 5: the split has 5 samples, numbered from 0$"),
        ([-1, 2], "rows are from -1 to 2"),
        ([2, 1], r"not in ascending order without duplicates: give np\.unique\(rows\)"),
        ([1, 1], "not in ascending order"),
        ([[0, 1], [2, 3]], r"rows is an array of int64 of shape \(2, 2\)"),
        ([0.0, 1.0], "rows is an array of float64"),
        ([True, False, True, False, False], r"rows is an array of bool of shape \(5,\).*np\.flatnonzero\(mask\)"),
        (3, r"rows is an array of int64 of shape \(\)"),
    ],
)
def test_row_numbers_are_ascending_integers_within_the_split(rows, message):
    with pytest.raises(DatasetError, match=message):
        row_numbers(rows, 5)
    for good in ([], [1, 3, 4], np.arange(2, dtype=np.uint8)):
        found = row_numbers(good, 5)
        assert (found.dtype.name, found.tolist()) == ("int64", list(good))
