"""Arguments of another type: made what they should be, or refused in one line that says what to give."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.common.errors import DatasetError, UserError
from shards.format.dataset import Dataset, open_dataset
from shards.order.epoch_order import OrderSettings
from shards.order.mixture import Mix
from shards.storage.location import Location
from shards.stream.loader import loader
from shards.stream.sample_cache import SampleCache
from shards.stream.streams import EvalStream, ShardStream
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


def test_a_path_is_as_good_as_a_string(dataset: Dataset, tmp_path: Path) -> None:
    same = open_dataset(Path(dataset.root.url))
    assert same.root == dataset.root
    cache = SampleCache(tmp_path / "cache", 10**6)
    assert cache == SampleCache(str(tmp_path / "cache"), 10**6)
    assert len(next(iter(ShardStream(same, "train", batch_size=4, cache=cache)))) == 4


def test_what_is_no_dataset_is_told_how_to_become_one(dataset: Dataset) -> None:
    mix = Mix([dataset, dataset], [1, 1])
    for given, message in (
        ("/data/streets", r"'/data/streets': open it first, open_dataset\('/data/streets'\)$"),
        (Path("/data/streets"), r"open it first, open_dataset\('/data/streets'\)$"),
        (Location("s3://bucket/streets"), r"open it first, open_dataset\('s3://bucket/streets'\)$"),
        ([dataset, dataset], r"a list: give Mix\(datasets, weights\)$"),
        (None, r"a NoneType: give what open_dataset returns$"),
    ):
        with pytest.raises(DatasetError, match=message):
            ShardStream(given, "train", batch_size=4)
    for given, message in (
        (mix, r"a Mix: evaluate each of its datasets by itself$"),
        ([dataset, dataset], "a list: evaluate one at a time$"),
        ("/data/streets", r"open it first, open_dataset\("),
    ):
        with pytest.raises(DatasetError, match=message):
            EvalStream(given, "val", batch_size=4)


def test_other_wrong_arguments_are_one_line_too(dataset: Dataset, tmp_path: Path) -> None:
    def stream(**options: object) -> ShardStream:
        return ShardStream(dataset, "train", **({"batch_size": 4} | options))

    for call, message in (
        (lambda: open_dataset(None), "the root of a dataset is None: give a local path or a URL"),
        (lambda: stream(cache=str(tmp_path)), r"give SampleCache\('/.*', limit in bytes\)"),
        (lambda: stream(read_ahead="64"), "read_ahead is '64': give a number"),
        (lambda: stream(parse=None), "give functions, or leave them out"),
        (lambda: stream(collate="list"), "give functions, or leave them out"),
        (lambda: loader(dataset), r"a loader reads a stream, not a Dataset: give ShardStream\(\.\.\.\)"),
        (lambda: loader(stream(), workers=1, start_method="thread"), "start_method is 'thread': give one of fork"),
        (lambda: dataset.select(classes="Car"), r"classes is 'Car': give a list, classes=\['Car'\]"),
        (lambda: dataset.select(classes=2), r"classes is 2: give a list, classes=\[2\]"),
        (lambda: Mix(dataset, [1]), r"a mix needs a list of datasets and one of weights"),
        (lambda: Mix([dataset], None), r"a mix needs a list of datasets and one of weights"),
        (lambda: Mix(["/data"], [1]), "a mix holds '/data': give what open_dataset returns"),
        (lambda: SampleCache("", 10**6), "the directory of a cache is '': give a local path"),
        (lambda: SampleCache(None, 10**6), "the directory of a cache is None: give a local path"),
        (lambda: SampleCache(tmp_path, "10GB"), "the limit of a cache, in bytes, is '10GB': give a number"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 5], "rows holds 0 to 5: the split has 5 samples, numbered from 0$"),
        ([-1, 2], "rows holds -1 to 2"),
        ([2, 1], r"rows are not ascending, each once: give np\.unique\(rows\)"),
        ([1, 1], "rows are not ascending"),
        ([[0, 1], [2, 3]], r"rows is an array of int64 of shape \(2, 2\)"),
        ([0.0, 1.0], "rows is an array of float64"),
        ([True, False, True, False, False], r"rows is an array of bool of shape \(5,\).*np\.flatnonzero\(mask\)"),
        (3, r"rows is an array of int64 of shape \(\)"),
    ],
)
def test_rows_of_an_evaluation_are_numbers_of_its_samples(dataset: Dataset, rows: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        EvalStream(dataset, "val", batch_size=2, rows=rows)


def test_rows_may_be_a_list_or_none_at_all(dataset: Dataset) -> None:
    for rows, expected in (([], 0), ([1, 3, 4], 3), (np.arange(2, dtype=np.uint8), 2)):
        stream = EvalStream(dataset, "val", batch_size=2, rows=rows)
        assert sum(len(batch) for batch in stream) == expected == stream.samples
