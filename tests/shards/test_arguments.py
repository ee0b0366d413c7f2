"""Arguments of another type: made what they should be, or refused in one line that says what to give."""

import json

import numpy as np
import pytest
import torch

from shards.dataset import Dataset
from shards.errors import DatasetError
from shards.loader import loader
from shards.mixing import Mix
from shards.order import OrderSettings
from shards.stream import EvalStream, ShardStream
from tests.support import sample, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("data")
    return write_dataset(root, {"train": [sample(n) for n in range(12)], "val": [sample(n) for n in range(20, 25)]})


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_the_identity_is_json_whatever_kind_of_numbers_are_given(dataset: Dataset, kind: type) -> None:
    options = {"batch_size": 4, "seed": 3, "lanes": 2, "window": 8}
    plain = ShardStream(dataset, "train", **options)
    given = ShardStream(dataset, "train", start=kind(2), **{name: kind(value) for name, value in options.items()})
    assert json.dumps(given.order.identity()) == json.dumps(plain.order.identity())
    assert given.start == 2
    other = OrderSettings(4, group_by_aspect=np.bool_(True), repeat_threshold=np.float32(0.5))
    assert json.dumps([other.group_by_aspect, other.repeat_threshold]) == "[true, 0.5]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1.5}, r"order: seed is 1\.5: give a whole number$"),
        ({"seed": None}, r"order: seed is None: give a whole number$"),
        ({"window": 8.0}, r"order: window is 8\.0: give a whole number$"),
        ({"repeat_threshold": "0.1"}, r"order: repeat_threshold is '0\.1': give a number$"),
        ({"batch_size": 4.0}, r"batch_size is 4\.0: give a whole number$"),
        ({"start": 3.0}, r"start is 3\.0: give a whole number$"),
        ({"rank": "0", "world": 2}, r"rank is '0': give a whole number, int\('0'\)$"),
        ({"world": "two"}, r"world is 'two': give a whole number$"),
    ],
)
def test_what_is_no_number_is_refused_by_name(dataset: Dataset, options: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=f"^{message}"):
        ShardStream(dataset, "train", **({"batch_size": 4} | options))
    if options.keys() <= {"batch_size", "rank", "world"}:
        with pytest.raises(DatasetError, match=f"^{message}"):
            EvalStream(dataset, "val", **({"batch_size": 4} | options))


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (-1, "workers is -1: it must be 0 or more"),
        (2.0, "workers is 2.0: give a whole number"),
        (None, "workers is None: give a whole number"),
    ],
)
def test_loader_processes_are_a_whole_number(dataset: Dataset, workers: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        loader(EvalStream(dataset, "val", batch_size=2), workers=workers)


def test_numbers_of_a_selection_and_of_a_mix(dataset: Dataset) -> None:
    with pytest.raises(DatasetError, match=r"^fraction is '0\.5': give a number"):
        dataset.select(fraction="0.5")
    with pytest.raises(DatasetError, match=r"^the seed of a selection is 1\.5: give a whole number"):
        dataset.select(fraction=0.5, seed=1.5)
    with pytest.raises(DatasetError, match=r"its weight in the mix is '3': give a number"):
        Mix([dataset], ["3"])
