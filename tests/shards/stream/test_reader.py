import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.errors import SampleError
from shards.storage.location import Location
from shards.stream.reader import SampleReader
from tests.shards.stream.support import SAMPLES


@given(order=st.lists(st.integers(0, SAMPLES - 1), max_size=80), read_ahead=st.sampled_from([1, 10**4, 10**6]))
def test_samples_are_read_in_order_with_any_read_ahead(local, order, read_ahead):
    index = local.index("train")
    read = list(SampleReader(local.root, index, read_ahead).read(order))
    assert [row for row, _ in read] == order
    for row, data in read:
        path = f"{local.root.path}/{index.shard_paths[index.shard[row]]}"
        with open(path, "rb") as file:
            file.seek(index.offset[row])
            assert file.read(index.nbytes[row]) == data


def test_a_whole_split_takes_few_requests(local):
    reader = SampleReader(local.root, local.index("train"))
    assert len(list(reader.read(range(SAMPLES)))) == SAMPLES
    assert reader.statistics.requests == 6  # one per shard: the split is smaller than the first look-ahead
    assert reader.statistics.nbytes == int(local.index("train").nbytes.sum())
    assert reader.statistics.retries == 0


def test_an_unreadable_sample_is_an_error_with_shard_key_and_offset(local, tmp_path, monkeypatch):
    monkeypatch.setattr("shards.common.back_off.SCALE", 0)
    shutil.copytree(local.root.path, tmp_path, dirs_exist_ok=True)
    shard, reader = tmp_path / "train" / "000000.tar", SampleReader(Location(str(tmp_path)), local.index("train"))
    data = shard.read_bytes()
    for damaged, message in (
        (data[:2000] + b"\xff\xff" + data[2002:], "the index says"),
        (data[:1000], "ends before the sample does, with 1000 of its"),
    ):
        shard.write_bytes(damaged)
        with pytest.raises(SampleError, match=rf"train/000000.tar: sample {0:016x} at offset 0.*{message}"):
            list(reader.read([0]))
    assert [row for row, _ in reader.read([20, 39])] == [20, 39]  # other samples can still be read
