from collections import Counter
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.format.index import Index
from shards.order.epoch_order import Order, OrderSettings, positions
from shards.stream.read_plan import HORIZON, MAX_GAP, MAX_RANGE, ByteRange, ReadPlan


def make_index(shard, nbytes, gaps):
    """An index of consecutive samples, with `gaps` bytes before each, as a subset leaves them."""
    shard, nbytes, gaps = np.array(shard, np.int32), np.array(nbytes, np.int64), np.array(gaps, np.int64)
    ends = np.cumsum(nbytes + gaps)
    zeros = np.zeros(len(shard), np.int32)
    paths = tuple(f"train/{n:06d}.tar" for n in range(int(shard.max()) + 1))
    ids = pa.array([f"{n:016x}" for n in range(len(shard))])
    return Index(paths, shard, ends - nbytes, nbytes, zeros.astype(np.uint32), zeros, zeros, ids)


def carry_out(index, rows, budget, cached=frozenset()):
    """Return all requests of a plan, and the rows as they were taken; check memory, and that each was requested."""
    plan = ReadPlan(index, iter(rows), budget, cached.__contains__)
    ranges, taken, held = list[ByteRange](), list[int](), Counter[int]()
    while True:
        for span in plan.ask():
            ranges.append(span)
            for row in span.rows:
                assert not held[row], "requested while it is in memory"
                held[row] = int(index.nbytes[row])
        assert plan.held == sum(held.values())
        assert plan.held <= max(budget, max(held.values(), default=0))
        if (step := plan.take()) is None:
            assert not +held, "requested in vain"
            return ranges, taken
        row, done = step
        taken.append(row)
        assert held[row] or row in cached
        if done:
            held[row] = 0


samples = st.lists(
    st.tuples(st.booleans(), st.integers(1, 2**20), st.sampled_from([0, 0, 0, 1, 500, 70_000])), min_size=1, max_size=50
)


@given(places=samples, data=st.data(), budget=st.integers(1, 2**25))
def test_every_sample_is_requested_in_time_and_within_the_budget(places, data, budget):
    new_shard, nbytes, gaps = zip(*places, strict=True)
    index = make_index(np.cumsum(new_shard), nbytes, gaps)
    number = st.integers(0, len(index) - 1)
    seen, cached = data.draw(st.lists(st.none() | number, max_size=120)), data.draw(st.frozensets(number, max_size=10))
    ranges, taken = carry_out(index, seen, budget, cached)
    rows = [row for row in seen if row is not None]
    assert taken == rows
    for span in ranges:
        one, last = span.rows[0], span.rows[-1]
        assert {span.shard} == set(index.shard[span.rows])
        assert (span.start, span.end) == (index.offset[one], index.offset[last] + index.nbytes[last])
        assert span.end - span.start <= max(MAX_RANGE, int(index.nbytes[span.rows].max()))
        in_vain = span.end - span.start - int(index.nbytes[span.rows].sum())
        assert 4 * in_vain <= int(index.nbytes[span.rows].sum())
        assert not cached & set(span.rows)
    if len(set(rows)) == len(rows):
        assert sum(len(span.rows) for span in ranges) == len(set(rows) - cached)  # none of them twice


@pytest.mark.parametrize(("gap", "requests"), [(MAX_GAP, 1), (MAX_GAP + 1, 2)])
def test_neighbours_share_a_request_up_to_a_maximum_gap(gap, requests):
    assert len(carry_out(make_index([0, 0], [300_000] * 2, [0, gap]), [0, 1], 2**26)[0]) == requests
    small = make_index([0, 0], [1000] * 2, [0, 251])  # more than a quarter of the second one
    assert len(carry_out(small, [0, 1], 2**26)[0]) == 2


def test_requests_start_small_and_grow():
    index = make_index(np.zeros(4000, np.int32), [100_000] * 4000, [0] * 4000)
    plan = ReadPlan(index, iter(range(4000)), 2**26, lambda row: False)
    sizes: list[int] = []
    for _ in range(3000):
        sizes.extend(span.end - span.start for span in plan.ask())
        plan.take()
    assert sum(sizes[:1]) <= 2**20 + 2**18
    assert sizes[-1] > 3 * 2**20
    assert len(sizes) < 150


@pytest.mark.parametrize(("workers", "most"), [(2, 0.45), (4, 0.25), (8, 0.25)])
def test_shuffled_windows_are_read_as_runs_of_neighbours(workers, most):
    """At the defaults, with samples of Open Images' size; the read-ahead holds only a part of the windows."""
    nbytes = np.random.default_rng(0).integers(80_000, 250_000, 8000)
    index = make_index(np.arange(8000) // 1500, nbytes, np.zeros(8000))
    order = Order(index, OrderSettings(8))
    batches = islice(positions(0, rank=0, world=1, worker=0, workers=workers), 500 // workers)
    rows = [int(row) for position in batches for row in order.rows(position)]
    ranges, _ = carry_out(index, rows, 64 * 2**20)
    assert len(ranges) < most * len(rows)


def test_the_horizon_is_found_soon_if_one_batch_in_nine_has_a_sample():
    index = make_index([0] * HORIZON, [1000] * HORIZON, [0] * HORIZON)
    rows = chain.from_iterable((row, *[None] * 8) for row in range(HORIZON))
    plan = ReadPlan(index, rows, 2**26, lambda row: False)
    for taken in range(9):
        plan.ask()
        assert plan.take() == (taken, True)
    assert len(list(rows)) <= 8
