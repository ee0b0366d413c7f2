import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.errors import SampleError
from shards.storage.location import Location
from shards.stream.reader import SampleReader
from tests.support import sample, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("data"), {"train": [sample(n, width=320, height=240) for n in range(40)]}, per_shard=16
    )


@given(order=st.lists(st.integers(0, 39), max_size=80), read_ahead=st.sampled_from([1, 10**4, 10**6]))
def test_samples_are_read_in_order_with_any_read_ahead(dataset, order, read_ahead):
    index = dataset.index("train")
    read = list(SampleReader(dataset.root, index, read_ahead).read(order))
    assert [row for row, _ in read] == order
    for row, data in read:
        path = f"{dataset.root.path}/{index.shard_paths[index.shard[row]]}"
        with open(path, "rb") as file:
            file.seek(index.offset[row])
            assert file.read(index.nbytes[row]) == data


def test_a_whole_split_takes_few_requests(dataset):
    reader = SampleReader(dataset.root, dataset.index("train"))
    assert len(list(reader.read(range(40)))) == 40
    assert reader.statistics.requests == 3  # one per shard: the split is smaller than the first look-ahead
    assert reader.statistics.nbytes == int(dataset.index("train").nbytes.sum())
    assert reader.statistics.retries == 0


def damaged(dataset, tmp_path, change):
    shard = tmp_path / "train" / "000000.tar"
    shard.parent.mkdir()
    for path in dataset.index("train").shard_paths:
        (tmp_path / path).write_bytes((Location(str(dataset.root)) / path).read())
    change(shard)
    return SampleReader(Location(str(tmp_path)), dataset.index("train"))


def flip_a_byte(shard):
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_byte, "the index says"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:1000]), "ends before the sample does, with 1000 of its"),
        (lambda shard: shard.unlink(), "there is no such object"),
    ],
    ids=["flipped byte", "truncated", "deleted"],
)
def test_an_unreadable_sample_is_an_error_with_shard_key_and_offset(dataset, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("shards.common.back_off.SCALE", 0)
    reader = damaged(dataset, tmp_path, change)
    with pytest.raises(SampleError, match=rf"train/000000.tar: sample {0:016x} at offset 0.*{message}"):
        list(reader.read([0]))
    # The intact samples can still be read.
    assert [row for row, _ in reader.read([20, 39])] == [20, 39]
