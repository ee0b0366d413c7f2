import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import SampleError
from shards.reader import MAX_GAP, MAX_RANGE, SampleReader, plan_spans
from shards.storage import Location
from tests.support import sample, write_dataset


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2**24), st.integers(1, 2**21)),
        min_size=1,
        max_size=60,
    )
)
def test_every_sample_lies_in_one_range_and_little_is_read_in_vain(places):
    shard, offset, nbytes = (np.array(column) for column in zip(*places, strict=True))
    spans = plan_spans(shard.astype(np.int32), offset, nbytes)
    served = sorted(place for span in spans for place in span.places)
    assert served == list(range(len(places)))
    for span in spans:
        for place in span.places:
            assert span.shard == shard[place]
            assert span.start <= offset[place]
            assert offset[place] + nbytes[place] <= span.end
        assert span.end - span.start <= max(MAX_RANGE, nbytes[list(span.places)].max())
        covered = np.zeros(span.end - span.start, dtype=bool)
        for place in span.places:
            covered[offset[place] - span.start : offset[place] + nbytes[place] - span.start] = True
        assert (~covered).sum() <= nbytes[list(span.places)].sum() / 4
    assert [span.places[0] for span in spans] == sorted(span.places[0] for span in spans)


def test_neighbours_become_one_range_and_distant_samples_do_not():
    ones = np.zeros(4, np.int32)
    sizes = np.full(4, 1000)
    assert len(plan_spans(ones, np.array([3000, 1000, 0, 2000]), sizes)) == 1
    assert len(plan_spans(ones, np.array([0, 1000, 10**6, 2 * 10**6]), sizes)) == 3
    assert len(plan_spans(np.arange(4, dtype=np.int32), np.zeros(4, np.int64), sizes)) == 4
    assert len(plan_spans(ones, np.array([0, 300_000 + MAX_GAP, 0, 0]), np.full(4, 300_000))) == 1
    assert len(plan_spans(ones, np.array([0, 300_001 + MAX_GAP, 0, 0]), np.full(4, 300_000))) == 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("data"), {"train": [sample(n, width=320, height=240) for n in range(40)]}, per_shard=16
    )


@given(order=st.lists(st.integers(0, 39), max_size=80), read_ahead=st.sampled_from([1, 10**4, 10**6]))
def test_samples_come_in_the_order_asked_whatever_the_memory(dataset, order, read_ahead):
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
    assert reader.statistics.requests == 3  # one a shard: the split is smaller than a block
    assert reader.statistics.nbytes == int(dataset.index("train").nbytes.sum())
    assert reader.statistics.retries == 0


def test_reading_ahead_stays_inside_its_budget(dataset):
    """An endless future is planned only as far as the budget goes: two blocks, each of half of it."""
    index = dataset.index("train")
    budget = 8 * int(index.nbytes.max())
    asked = []

    def future():
        for n in range(10**9):
            asked.append(n % 40)
            yield n % 40

    samples = SampleReader(dataset.root, index, budget).read(future())
    for consumed in range(1, 100):
        next(samples)
        held = sum(int(index.nbytes[row]) for row in asked[consumed - 1 :])
        # One more row is known than is held: the one that did not fit.
        assert held <= budget + int(index.nbytes.max())
    samples.close()


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
        (lambda shard: shard.write_bytes(shard.read_bytes()[:1000]), "ends at byte 1000"),
        (lambda shard: shard.unlink(), "there is no such object"),
    ],
    ids=["flipped byte", "truncated", "deleted"],
)
def test_a_sample_that_cannot_be_had_names_shard_key_and_offset(dataset, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("shards.reader.BACK_OFF_S", 0)
    reader = damaged(dataset, tmp_path, change)
    with pytest.raises(SampleError, match=rf"train/000000.tar: sample {0:016x} at offset 0.*{message}"):
        list(reader.read([0]))
    # What is whole can still be read.
    assert [row for row, _ in reader.read([20, 39])] == [20, 39]
