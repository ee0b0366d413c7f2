import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.common.errors import DatasetError
from shards.order.epoch_order import EvaluationOrder, Order, OrderSettings, positions
from shards.order.epoch_permutation import apart, chunk_starts, grouped
from tests.support import make_index, whole_epoch


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


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_positions_deal_the_batches_to_ranks_and_workers(world, workers, start):
    shares = [
        [positions(start, rank=rank, world=world, worker=worker, workers=workers) for worker in range(workers)]
        for rank in range(world)
    ]
    # A DataLoader asks its workers in turn. At each step the ranks together have the next `world` batches.
    dealt = [next(shares[rank][step % workers]) for step in range(7) for rank in range(world)]
    assert dealt == list(range(start, start + 7 * world))


@given(orders(), st.lists(st.integers(0, 400), min_size=1, max_size=12))
@settings(max_examples=50)
def test_a_batch_depends_on_its_position_alone(order, visited):
    fresh = {position: Order.rows(order, position).copy() for position in visited}
    order._epochs.values.clear()
    order._pieces.values.clear()
    for position in sorted(visited, reverse=True):
        assert np.array_equal(order.rows(position), fresh[position])


def test_the_order_is_pinned():
    """Runs are resumed on other machines and years later: the order must not change under one format version."""
    order = Order(make_index(np.full(12, 10)), OrderSettings(4, seed=7, lanes=2, window=4, chunk_bytes=30))
    assert whole_epoch(order, 0).tolist() == [[11, 1, 0, 2], [4, 8, 9, 10], [6, 7, 5, 3]]
    assert order.identity()["index"] == order.fingerprint


MASK = 2**64 - 1


def mixed(x):
    """Splitmix64's finaliser on Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def folded(*values):
    key = 0
    for value in values:
        key = mixed(key ^ (value & MASK))
    return key


def definition(order, epoch):
    """An epoch step by step, on lists of the whole epoch."""
    s, n = order.settings, order.samples
    key, batches = folded(s.seed, epoch), n // s.batch_size
    chunks = [list(range(a, b)) for a, b in pairwise([*order._starts.tolist(), n])]
    of_chunks = sorted(range(len(chunks)), key=lambda c: mixed(c ^ folded(key, 1)))
    rows = [row for c in of_chunks for row in chunks[c]]
    turn = folded(key, 2) % n
    rows = (rows[turn:] + rows[:turn])[: batches * s.batch_size]
    lanes = min(s.lanes, batches)
    cut, start = [], 0
    for lane in range(lanes):
        end = start + (batches // lanes + (lane < batches % lanes)) * s.batch_size
        places = []
        for first in range(start, end, s.window):
            window = range(first, min(first + s.window, end))
            places += sorted(window, key=lambda place: mixed(place ^ folded(key, 3)))
        in_lane = np.array([rows[place] for place in places])
        if s.group_by_aspect:
            in_lane = in_lane[grouped(order._portrait[in_lane], s.batch_size)]
        cut.append(in_lane.reshape(-1, s.batch_size).tolist())
        start = end
    return [cut[g % lanes][g // lanes] for g in range(batches)]


@given(orders(), st.integers(0, 3))
@settings(max_examples=60)
def test_batches_are_those_of_the_definition_and_hold_every_sample_once_but_for_less_than_a_batch(order, epoch):
    rows = whole_epoch(order, epoch)
    assert rows.tolist() == definition(order, epoch)
    assert len(np.unique(rows)) == rows.size > order.samples - order.settings.batch_size


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 7))
def test_grouped_batches_hold_one_kind_each(kinds, size):
    kind = np.array(kinds[: len(kinds) // size * size], dtype=bool)
    places = grouped(kind, size)
    assert sorted(places) == list(range(len(kind)))
    assert sum(len(set(batch)) > 1 for batch in kind[places].reshape(-1, size).tolist()) <= 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(1, 20), st.integers(1, 200))
def test_chunks_are_runs_of_one_shard_of_about_chunk_bytes(sizes, per_shard, chunk_bytes):
    shard = (np.arange(len(sizes)) // per_shard).astype(np.int32)
    nbytes = np.array(sizes, dtype=np.int64)
    starts = chunk_starts(shard, nbytes, chunk_bytes)
    assert (starts[0], sorted(set(starts))) == (0, starts.tolist())
    for start, end in pairwise([*starts, len(sizes)]):
        assert len(set(shard[start:end])) == 1
        # A chunk ends with the sample that reaches its share.
        assert nbytes[start : end - 1].sum() < chunk_bytes


@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_visits_every_sample_exactly_once(samples, batch_size, world, workers):
    order, rows = EvaluationOrder(make_index(np.full(samples, 1)), batch_size), []
    share = {"world": world, "workers": workers, "stop": len(order)}
    for rank, worker in product(range(world), range(workers)):
        for position in positions(0, rank=rank, worker=worker, **share):
            rows += order.rows(position).tolist()
            assert order.sizes(position) == (len(order.rows(position)),)
    assert sorted(rows) == list(range(samples))


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"lanes": 0}, {"window": 0}, {"seed": -1}, {"repeat_threshold": 1.5}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(DatasetError, match=f"{next(iter(wrong))} is"):
        OrderSettings(**{"batch_size": 4, **wrong})


def test_memory_does_not_depend_on_the_size_of_the_dataset():
    sizes = []
    for count in (2_000, 50_000):
        order = Order(make_index(np.full(count, 100_000), per_shard=1000), OrderSettings(8))
        for position in range(0, 3 * order.batches_per_epoch, order.batches_per_epoch // 50):
            order.rows(position)
        sizes.append(sum(piece.nbytes for piece in order._pieces.values.values()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.5)


@pytest.mark.parametrize("repeat_threshold", [0.0, 0.5])
def test_threads_can_share_an_order(repeat_threshold):
    """Each drops what another still needs."""
    index = make_index(np.full(40, 10), classes=[[1, 2] if n % 8 == 0 else [1] for n in range(40)])
    chosen = OrderSettings(4, window=4, repeat_threshold=repeat_threshold)
    shared, alone = Order(index, chosen), Order(index, chosen)
    expected = [alone.rows(position).tolist() for position in range(300)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: [shared.rows(position).tolist() for position in range(300)], range(12)))
    finally:
        sys.setswitchinterval(before)
    assert all(one == expected for one in found)
    assert len(shared._pieces.values) <= 2 * shared.lanes + 4
    assert len(shared._epochs.values) <= 2 + 4


@given(st.lists(st.integers(0, 30), max_size=60))
def test_apart_moves_equal_rows_half_the_length_apart(values):
    rows = np.array(values, dtype=np.int64)
    moved = apart(rows)
    assert sorted(moved) == sorted(rows)
    for value in set(values):
        places = np.flatnonzero(moved == value)
        if len(places) == 2:
            assert places[1] - places[0] >= len(set(values)) // 2
