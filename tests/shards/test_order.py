import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shards.dataset import INDEX_SCHEMA, Index
from shards.errors import DatasetError
from shards.order import Order, OrderSettings, chunk_starts, evaluation_batches, grouped, positions


def make_index(nbytes, per_shard=5):
    """An index whose samples have the given lengths; every third image is a portrait."""
    count = len(nbytes)
    shard = [f"train/{n // per_shard:06d}.tar" for n in range(count)]
    columns = {
        "image_id": [f"{n:016x}" for n in range(count)],
        "split": ["train"] * count,
        "shard": shard,
        "offset": np.cumsum(nbytes) - nbytes,
        "nbytes": nbytes,
        "crc32": np.arange(count),
        "width": np.full(count, 60),
        "height": np.where(np.arange(count) % 3 == 0, 80, 40),
        **{name: [[1]] * count for name in ("classes", "instances", "masks", "groups")},
    }
    table = pa.table({name: pa.array(columns[name], INDEX_SCHEMA.field(name).type) for name in INDEX_SCHEMA.names})
    return Index(table, tuple(dict.fromkeys(shard)))


@st.composite
def orders(draw):
    nbytes = np.array(draw(st.lists(st.integers(1, 50), min_size=1, max_size=100)))
    chosen = OrderSettings(
        batch_size=draw(st.integers(1, len(nbytes))),
        seed=draw(st.integers(0, 2**63)),
        lanes=draw(st.integers(1, 9)),
        window=draw(st.integers(1, 50)),
        group_by_aspect=draw(st.booleans()),
        chunk_bytes=draw(st.integers(1, 500)),
    )
    return Order(make_index(nbytes, draw(st.integers(1, 40))), chosen)


@given(orders(), st.integers(0, 5))
def test_an_epoch_visits_every_sample_once_but_for_less_than_a_batch(order, epoch):
    rows = order.epoch(epoch)
    assert rows.shape == (order.samples // order.settings.batch_size, order.settings.batch_size)
    assert len(np.unique(rows)) == rows.size
    assert order.samples - rows.size < order.settings.batch_size
    assert 0 <= rows.min() <= rows.max() < order.samples


@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 1000))
def test_ranks_and_workers_share_out_the_row_of_batches(world, workers, start):
    steps = 7
    shares = []
    for rank in range(world):
        loaders = [
            positions(start, rank=rank, world=world, worker=w, workers=max(workers, 1)) for w in range(max(workers, 1))
        ]
        # A DataLoader asks its workers in turn.
        shares.append([next(loaders[step % len(loaders)]) for step in range(steps)])
    # Step for step, the ranks together hold the next `world` batches: disjoint, none left out, the same for any world.
    assert [shares[rank][step] for step in range(steps) for rank in range(world)] == list(
        range(start, start + steps * world)
    )


@given(orders(), st.lists(st.integers(0, 400), min_size=1, max_size=12))
@settings(max_examples=50)
def test_a_batch_depends_on_its_position_alone(order, visited):
    fresh = {position: Order.batch(order, position).copy() for position in visited}
    order._epochs.clear()
    for position in sorted(visited, reverse=True):
        assert np.array_equal(order.batch(position), fresh[position])


@pytest.mark.parametrize("group_by_aspect", [False, True])
def test_the_same_seed_gives_the_same_order_and_another_seed_or_epoch_another(group_by_aspect):
    index = make_index(np.full(60, 10))
    order, same, other = (
        Order(index, OrderSettings(4, seed, window=16, group_by_aspect=group_by_aspect)) for seed in (3, 3, 4)
    )
    assert np.array_equal(order.epoch(1), same.epoch(1))
    assert not np.array_equal(order.epoch(1), order.epoch(0))
    assert not np.array_equal(order.epoch(1), other.epoch(1))


def test_the_order_is_pinned():
    """Runs of other machines and years resume by this order: it must never change under one format version."""
    order = Order(make_index(np.full(12, 10)), OrderSettings(4, seed=7, lanes=2, window=4, chunk_bytes=30))
    assert order.epoch(0).tolist() == [[11, 1, 0, 2], [4, 8, 9, 10], [6, 7, 5, 3]]
    assert order.identity()["index"] == order.fingerprint


def test_leftovers_differ_from_epoch_to_epoch_even_with_one_chunk():
    order = Order(make_index(np.full(10, 1), per_shard=10), OrderSettings(4, chunk_bytes=100))
    left = [frozenset(range(10)) - set(order.epoch(epoch).reshape(-1).tolist()) for epoch in range(8)]
    assert all(len(rows) == 2 for rows in left)
    assert len(set(left)) > 3


@given(orders())
def test_batches_of_a_lane_come_from_one_window_after_the_other(order):
    s = order.settings
    assume(not s.group_by_aspect)
    rows = order.epoch(0)
    lanes = min(s.lanes, len(rows))
    shuffled = np.concatenate([rows[lane::lanes].reshape(-1) for lane in range(lanes)])
    unshuffled = Order(_index_of(order), OrderSettings(s.batch_size, s.seed, s.lanes, 1, False, s.chunk_bytes)).epoch(0)
    plain = np.concatenate([unshuffled[lane::lanes].reshape(-1) for lane in range(lanes)])
    start = 0
    for lane in range(lanes):
        length = rows[lane::lanes].size
        for first in range(start, start + length, s.window):
            last = min(first + s.window, start + length)
            assert sorted(shuffled[first:last]) == sorted(plain[first:last])
        start += length


def _index_of(order):
    """An index with the same chunks: one shard a chunk."""
    lengths = np.diff(order._chunk_starts, append=order.samples)
    index = make_index(np.full(order.samples, 1))
    shard = [f"train/{n:06d}.tar" for n, length in enumerate(lengths) for _ in range(length)]
    table = index.table.set_column(index.table.schema.get_field_index("shard"), "shard", pa.array(shard))
    return Index(table, tuple(dict.fromkeys(shard)))


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 7))
def test_grouping_keeps_kinds_apart_and_loses_nothing(kinds, size):
    kind = np.array(kinds[: len(kinds) // size * size], dtype=bool)
    places = grouped(kind, size)
    assert sorted(places) == list(range(len(kind)))
    mixed = [batch for batch in kind[places].reshape(-1, size) if len(set(batch.tolist())) > 1]
    assert len(mixed) <= 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(1, 20), st.integers(1, 200))
def test_chunks_are_runs_of_one_shard_of_about_the_wanted_length(sizes, per_shard, chunk_bytes):
    shard = (np.arange(len(sizes)) // per_shard).astype(np.int32)
    nbytes = np.array(sizes, dtype=np.int64)
    starts = chunk_starts(shard, nbytes, chunk_bytes)
    ends = np.append(starts[1:], len(sizes))
    assert starts[0] == 0
    assert (ends > starts).all()
    for start, end in zip(starts, ends, strict=True):
        assert len(set(shard[start:end])) == 1
        # A chunk ends with the sample that starts past its share; only one sample may stand over.
        assert nbytes[start : end - 1].sum() < chunk_bytes


@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_visits_every_sample_exactly_once(samples, batch_size, world, workers):
    rows = [
        row
        for rank in range(world)
        for worker in range(workers)
        for batch in evaluation_batches(samples, batch_size, rank=rank, world=world, worker=worker, workers=workers)
        for row in batch.tolist()
    ]
    assert sorted(rows) == list(range(samples))


def test_fewer_samples_than_a_batch_is_an_error_that_says_so():
    with pytest.raises(DatasetError, match="has 3 samples, fewer than one batch of 4: lower the batch size"):
        Order(make_index(np.full(3, 1)), OrderSettings(4))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"lanes": 0}, {"window": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(DatasetError, match=f"{next(iter(wrong))} is"):
        OrderSettings(**{"batch_size": 4, **wrong})
