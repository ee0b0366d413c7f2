import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.common.errors import DatasetError
from shards.format.selection import Selection, hash_keys, select_rows
from shards.order.epoch_order import Order, OrderSettings
from shards.stream.streams import EvalStream, ShardStream
from tests.shards.order.test_epoch_order import folded, mixed
from tests.support import make_index

KEYS = st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True), min_size=1, max_size=20)


def ids(index):
    return set(index.image_ids.to_pylist())


@pytest.mark.parametrize("car", ["Car", "car", "/m/0k4j", 2, "2"])
def test_a_class_is_selected_by_name_mid_or_id(dataset, car):
    chosen = dataset.select(classes=[car])
    assert ids(chosen.index("train")) == {f"{n:016x}" for n in range(1, 40, 2)}
    assert [category.name for category in chosen.categories] == ["Car"]
    assert chosen.index("train").counts("images", chosen.categories) == {2: 20}


def test_samples_of_selected_classes_come_without_annotations_of_others(dataset):
    cars = dataset.select(classes=["Car"])
    training = itertools.islice(ShardStream(cars, "train", batch_size=4, seed=2), 5)
    for samples in (itertools.chain(*training), itertools.chain(*EvalStream(cars, "train", batch_size=3))):
        found = [([instance.category_id for instance in one.instances], one.verified_present) for one in samples]
        assert found == [([2], ())] * 20  # Person is verified as present


def test_the_identity_depends_on_the_classes_even_if_the_samples_are_the_same(dataset):
    def identity(**selected):
        return Order(dataset.select(**selected).index("train"), OrderSettings(4)).identity()["index"]

    every, persons, cars = identity(), identity(classes=["Person"]), identity(classes=["Car"])
    assert len({every, persons, cars, identity(fraction=0.5)}) == 4
    assert every == Order(dataset.index("train"), OrderSettings(4)).identity()["index"]


@settings(deadline=None)
@given(st.floats(0.05, 1), st.floats(0.05, 1), st.integers(0, 5))
def test_a_larger_fraction_contains_a_smaller_one(one, other, seed):
    index = make_index(np.full(300, 10))
    small, large = (ids(select_rows(index, Selection(None, f, seed), "")) for f in sorted((one, other)))
    assert small <= large


def test_a_fraction_is_about_that_share_and_depends_on_the_seed():
    index = make_index(np.full(5000, 10))
    chosen = [ids(select_rows(index, Selection(None, 0.3, seed), "")) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    for one in chosen:
        assert abs(len(one) - 1500) < 5 * np.sqrt(5000 * 0.3 * 0.7)


@settings(deadline=None, max_examples=30)
@given(KEYS, st.integers(0, 2**63))
def test_the_hash_of_a_key_depends_on_key_and_seed_alone(keys, seed):
    def slowly(key):
        value = folded(seed)
        data = key.encode("ascii")
        for start in range(0, len(data), 8):
            value = mixed(value ^ int.from_bytes(data[start : start + 8].ljust(8, b"\0"), "little"))
        return value

    assert hash_keys(pa.array(keys), seed).tolist() == [slowly(key) for key in keys]


def test_the_selected_samples_are_pinned(dataset):
    """Runs resume with them, and learning curves are compared on them: they must not change."""
    chosen = dataset.select(classes=["Car"], fraction=0.3).index("train")
    assert [int(key, 16) for key in chosen.image_ids.to_pylist()] == [1, 11, 17, 25, 33]


def test_what_is_not_selected_is_never_fetched(dataset):
    part = dataset.select(classes=["Car"], fraction=0.5)
    index = part.index("train")
    stream = ShardStream(part, "train", batch_size=len(index))
    next(iter(stream))
    # Two blocks are requested: at most the whole epoch, and no sample that is not selected.
    assert stream._readers[0].statistics.nbytes <= 2 * int(index.nbytes.sum())
    assert 4 < len(index) < 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["Persn"]}, "there is no class 'Persn': did you mean Person"),
        ({"classes": ["Zebra"]}, "there is no class 'Zebra': it has Person, Car"),
        ({"classes": [7]}, "there is no class '7'"),
        ({"fraction": 0}, "fraction is 0: it must be above 0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"seed": -1}, "seed of a selection is -1"),
        ({"classes": []}, "classes is empty: name at least one, or give classes=None"),
        ({"fraction": 1e-6}, "no sample is selected: choose other classes or a larger fraction"),
    ],
)
def test_a_wrong_or_empty_selection_is_refused(dataset, options, message):
    with pytest.raises(DatasetError, match=message):
        dataset.select(**options).index("train")


def test_a_selection_can_be_narrowed_in_any_order(dataset):
    at_once = dataset.select(classes=["Car"], fraction=0.5, seed=3)
    cars, half = dataset.select(classes=["Car"]), dataset.select(fraction=0.5, seed=3)
    for chosen in (cars.select(fraction=0.5, seed=3), half.select(classes=["Car"]), at_once.select(), at_once):
        assert chosen.selection == at_once.selection
        assert ids(chosen.index("train")) == ids(cars.index("train")) & ids(half.index("train"))
        assert [category.name for category in chosen.categories] == ["Car"]
    assert dataset.select(classes=["Car", "Person"]).select(classes=[2]).selection == cars.selection
    with pytest.raises(DatasetError, match="there is no class 'Person': it has Car"):
        cars.select(classes=["Person"])
    with pytest.raises(DatasetError, match=r"fraction 0.25 of a selection that is fraction 0.5 already: select once"):
        half.select(fraction=0.25)
