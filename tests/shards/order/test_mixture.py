import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shards.common.errors import DatasetError
from shards.format.dataset import Category
from shards.order.epoch_order import OrderSettings
from shards.order.mixture import Mix, MixedOrder, apportion, whole_weights
from shards.stream.streams import ShardStream
from tests.shards.stream.support import keys, take_keys
from tests.support import make_index, sample, write_dataset

weights_of = st.lists(st.integers(1, 50), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("a"), {"train": [sample(n) for n in range(30)]}, per_shard=7)


@pytest.fixture(scope="module")
def yards(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("b"), {"train": [sample(n) for n in range(100, 111)]}, per_shard=4)


def test_a_rare_dataset_is_read_without_searching_far_ahead(streets, yards):
    """Its next 2048 samples are spread over two and a half million batches."""
    mix = Mix([streets, yards], [9999, 1])
    stream = ShardStream(mix, "train", batch_size=8)
    expected, looked_at = MixedOrder(mix.indexes("train"), mix.weights, stream.order.settings), Counter[int]()

    def rows(position, number):
        looked_at[number] += 1
        return expected.rows(position, number)

    stream.order.rows = rows  # type: ignore[method-assign]
    ids, rare = [index.image_id for index in expected.indexes], 0
    for position, batch in enumerate(itertools.islice(stream, 1000)):
        assert keys(batch) == tuple(ids[n](row) for n in range(2) for row in expected.rows(position, n))
        rare += expected.sizes(position)[1]
        assert looked_at[1] <= rare * 2100 + position
    assert rare > 0


@given(weights_of, st.integers(0, 10_000))
@example([7, 39, 4, 37], 757)  # more than two off
def test_apportion_is_exact_monotonic_and_in_proportion(weights, total):
    counts = apportion(total, weights)
    assert sum(counts) == total
    grown = apportion(total + 1, weights)
    assert sorted(after - before for before, after in zip(counts, grown)) == [0] * (len(weights) - 1) + [1]
    for count, weight in zip(counts, weights):
        assert abs(count - total * weight / sum(weights)) < max(1, len(weights) - 1)


@pytest.mark.parametrize(
    ("weights", "whole"), [((0.7, 0.3), (7, 3)), ((2, 4), (1, 2)), ((0.1, 0.2, 0.7), (1, 2, 7)), ((5,), (1,))]
)
def test_whole_weights_keep_decimal_proportions(weights, whole):
    assert whole_weights(weights) == whole


@st.composite
def mixes(draw):
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    weights = draw(st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)))
    size, seed, lanes, window = (draw(st.integers(low, high)) for low, high in ((1, 9), (0, 99), (1, 5), (1, 20)))
    chosen = OrderSettings(size, seed, lanes, window, chunk_bytes=50)
    return MixedOrder([make_index(np.full(n, 10)) for n in lengths], weights, chosen), lengths, weights


@settings(max_examples=60)
@given(mixes())
def test_each_dataset_has_its_own_epochs_and_its_share_of_every_stretch(mix):
    order, lengths, weights = mix
    batches = 60
    for number, (length, weight) in enumerate(zip(lengths, weights)):
        rows = [order.rows(position, number) for position in range(batches)]
        assert [len(own) for own in rows] == [order.sizes(position)[number] for position in range(batches)]
        seen = Counter(np.concatenate(rows).tolist())
        assert set(seen) <= set(range(length))
        wanted = batches * order.settings.batch_size * weight / sum(weights)
        assert abs(seen.total() - wanted) <= 2 * order.lanes
        # Every lane is as far in its epochs as the others, to within what its share was rounded by.
        most, least = max(seen.values()), min(seen.get(row, 0) for row in range(length))
        assert most - least <= 2 + (4 + order.settings.batch_size) // (length // order.lanes)
    assert all(sum(order.sizes(position)) == order.settings.batch_size for position in range(batches))


@settings(max_examples=30)
@given(mixes(), st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_a_batch_of_a_mix_depends_on_its_position_alone(mix, positions):
    order, lengths, weights = mix
    again = MixedOrder([make_index(np.full(n, 10)) for n in lengths], weights, order.settings)
    for number in range(len(lengths)):
        found = {p: order.rows(p, number).tolist() for p in positions}
        assert found == {p: again.rows(p, number).tolist() for p in sorted(found, reverse=True)}


@pytest.mark.parametrize(("world", "workers", "start"), [(1, 2, 1), (2, 0, 8), (3, 2, 23)])
def test_any_number_of_ranks_and_workers_gives_the_same_mix_from_any_position(streets, yards, world, workers, start):
    mix, steps = Mix((streets, yards), (0.75, 0.25)), 5
    ranks = [take_keys(mix, steps, workers, start=start, rank=rank, world=world) for rank in range(world)]
    dealt = [ranks[rank][step] for step in range(steps) for rank in range(world)]
    assert dealt == take_keys(mix, start + steps * world)[start:]


def test_the_identity_holds_all_datasets_and_weights(streets, yards):
    def identity(datasets, weights):
        return ShardStream(Mix(datasets, weights), "train", batch_size=2).order.identity()

    one = identity((streets, yards), (3, 1))
    assert one == identity((streets, yards), (0.75, 0.25))
    assert one != identity((streets, yards), (1, 1))
    assert one != identity((yards, streets), (3, 1))
    assert one != identity((streets, yards.select(fraction=0.9)), (3, 1))


def test_the_visit_of_a_mix_is_the_position(streets, yards):
    stream = ShardStream(
        Mix((streets, yards), (1, 3)), "train", batch_size=4, collate=lambda batch, visit: (set(keys(batch)), visit)
    )
    batches = list(itertools.islice(stream, 40))
    assert len({visit for _, visit in batches}) == 40
    # Only where one epoch of the small dataset ends and the next begins may a batch hold a sample twice.
    assert sum(len(batch) < 4 for batch, _ in batches) <= 40 * 3 // 11


def test_differing_ids_become_those_of_the_first_dataset(streets, yards):
    swapped = (Category(1, "Car", "/m/0k4j"), Category(2, "Person", "/m/01g317"))
    other = replace(yards, info=replace(yards.info, categories=swapped))
    stream = ShardStream(Mix((streets, other), (1, 1)), "train", batch_size=8)
    for one in next(iter(stream)):
        # In the shards 1 is Person; the second dataset says that its 1 is a car.
        first = 1 if int(one.image_id, 16) < 100 else 2
        assert one.instances[0].category_id == first
        assert one.verified_present == (first,)
    assert stream.order.identity() != ShardStream(Mix((streets, yards), (1, 1)), "train", batch_size=8).order.identity()


@pytest.mark.parametrize(
    ("datasets", "weights", "options", "message"),
    [
        (lambda a, b: (a, b), (1,), {}, "2 datasets with 1 weights"),
        (lambda a, b: (), (), {}, "0 datasets"),
        (lambda a, b: (a, b), (1, 0), {}, "its weight in the mix is 0"),
        (lambda a, b: (a, b.select(classes=["Car"])), (1, 1), {}, "has no class Person, which is in the mix.*select"),
        (lambda a, b: (a.select(classes=["Car"]), b), (1, 1), {}, "has no class Person"),
        (lambda a, b: (a, b), (1, 1), {"split": "val"}, "no split 'val'"),
        (lambda a, b: (a, b), (1, 1), {"group_by_aspect": True}, "group_by_aspect needs a single dataset"),
    ],
)
def test_a_wrong_mix_is_refused(streets, yards, datasets, weights, options, message):
    with pytest.raises(DatasetError, match=message):
        ShardStream(Mix(datasets(streets, yards), weights), **({"split": "train", "batch_size": 2} | options))


def test_the_order_of_a_mix_is_pinned():
    chosen = OrderSettings(4, seed=7, lanes=2, window=4, chunk_bytes=30)
    order = MixedOrder([make_index(np.full(n, 10)) for n in (12, 6)], (3, 1), chosen)
    assert [[order.rows(position, number).tolist() for number in (0, 1)] for position in range(4)] == [
        [[4, 10, 2], [4]],
        [[7, 6, 5], [5]],
        [[3, 8, 11], [2]],
        [[9, 1, 0], [1]],
    ]
