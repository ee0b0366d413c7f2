from collections import Counter
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.common.errors import DatasetError
from shards.common.splitmix import fold
from shards.order.epoch_order import Order, OrderSettings
from shards.order.epoch_permutation import passes
from shards.order.repeat_factors import UNIT, repeat_factors, rounded
from tests.support import make_index, whole_epoch

labels = st.lists(st.sets(st.integers(1, 6), max_size=4), min_size=1, max_size=60)


def lvis(classes, threshold):
    """The three steps of the paper, image by image."""
    images_with = Counter(c for own in classes for c in own)
    of_class = {c: max(1.0, sqrt(threshold / (count / len(classes)))) for c, count in images_with.items()}
    return [max((of_class[c] for c in own), default=1.0) for own in classes]


def rare_ones(count=400):
    """Class 1 in every sample, class 2 in one of 20, class 3 in one of 200."""
    classes = [{1} | ({2} if n % 20 == 3 else set()) | ({3} if n % 200 == 7 else set()) for n in range(count)]
    return make_index(np.full(count, 1000), per_shard=50, classes=classes)


@given(labels, st.floats(0.001, 1))
def test_factors_are_those_of_lvis(classes, threshold):
    index = make_index(np.full(len(classes), 10), classes=classes)
    assert repeat_factors(index, threshold) == pytest.approx(lvis(classes, threshold))


@given(st.lists(st.integers(UNIT, 5 * UNIT), min_size=1, max_size=50), st.integers(0, 2**64 - 1))
def test_factors_are_rounded_down_or_up_and_totals_differ_by_at_most_one(units, key):
    units = np.array(units)
    visits = rounded(units, np.uint64(key))
    assert (visits >= units // UNIT).all()
    assert (visits <= -(-units // UNIT)).all()
    assert int(visits.sum()) - units.sum() // UNIT in (0, 1)


def test_visits_average_to_the_factor():
    units = np.array([UNIT, UNIT * 5 // 4, UNIT * 3 // 2, UNIT * 19 // 10, UNIT * 31 // 10] * 10)
    epochs = 4000
    total = sum(rounded(units, fold(7, epoch)) for epoch in range(epochs))
    # Five standard deviations of the mean of fair roundings.
    assert total / epochs == pytest.approx(units / UNIT, abs=5 * 0.5 / sqrt(epochs))


def test_roundings_of_two_samples_are_independent_over_epochs():
    units = np.full(100, UNIT * 3 // 2)
    pairs = np.mean([(v := rounded(units, fold(epoch)) > 1)[0] == v[1] for epoch in range(2000)])
    assert 0.44 < pairs < 0.56  # 0 or 1 with one offset over a fixed order


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40).filter(any))
def test_passes_contain_each_row_as_often_as_it_is_visited(visits):
    rows = passes(np.array(visits))
    assert Counter(rows.tolist()) == Counter({row: times for row, times in enumerate(visits) if times})
    assert (np.diff(rows) <= 0).sum() == max(visits) - 1  # each pass ascends


@settings(max_examples=40)
@given(labels, st.integers(1, 7), st.integers(1, 5), st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 3))
def test_an_epoch_visits_every_sample_as_often_as_its_factor_says(classes, size, lanes, window, threshold, epoch):
    index = make_index(np.full(len(classes), 10), classes=classes)
    size = min(size, len(classes))
    order = Order(index, OrderSettings(size, 5, lanes, window, chunk_bytes=70, repeat_threshold=threshold))
    rows = whole_epoch(order, epoch)
    wanted = np.rint(repeat_factors(index, threshold) * UNIT).astype(np.int64)
    assert rows.shape == (wanted.sum() // UNIT // size, size)
    visits = np.bincount(rows.reshape(-1), minlength=len(index))
    assert (visits <= -(-wanted // UNIT)).all()
    # Only the leftovers are lost, fewer than a batch, and the one by which epochs differ.
    assert np.maximum(wanted // UNIT - visits, 0).sum() <= size


def test_a_batch_rarely_holds_a_sample_twice():
    index = rare_ones(2000)
    order = Order(index, OrderSettings(8, 1, 8, 128, chunk_bytes=20_000, repeat_threshold=0.5))
    batches = np.concatenate([whole_epoch(order, epoch) for epoch in range(3)])
    twice = sum(len(set(batch)) < len(batch) for batch in batches.tolist())
    assert repeat_factors(index, 0.5).max() == pytest.approx(10)  # one of 200
    assert twice / len(batches) < 0.01
    # Visits of a rare sample are spread over the epoch.
    [places] = np.where((whole_epoch(order, 0) == 7).any(axis=1))
    assert len(places) >= 9
    assert places.max() - places.min() > order.batches_per_epoch / 2


def test_only_selected_classes_count_and_labels_are_needed():
    chosen = replace(rare_ones(), category_ids={1: 1, 2: 2})
    assert repeat_factors(chosen, 0.5).max() == pytest.approx(sqrt(0.5 / (1 / 20)))
    with pytest.raises(DatasetError, match="need an index with labels"):
        repeat_factors(replace(chosen, labels=None), 0.5)


def test_the_order_with_repeats_is_pinned():
    index = make_index(np.full(12, 10), classes=[{1, 2} if n == 4 else {1} for n in range(12)])
    order = Order(index, OrderSettings(4, seed=7, lanes=2, window=8, chunk_bytes=30, repeat_threshold=0.6))
    assert order.visits == 13
    assert whole_epoch(order, 0).tolist() == [[10, 4, 3, 11], [1, 2, 5, 6], [9, 0, 8, 4]]
    assert whole_epoch(order, 1).tolist() == [[4, 5, 10, 9], [0, 1, 7, 6], [8, 4, 11, 3]]
