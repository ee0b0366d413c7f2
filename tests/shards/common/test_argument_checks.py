import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.common.errors import UserError
from shards.format.dataset import Dataset, open_dataset
from shards.order.epoch_order import OrderSettings
from shards.order.mixture import Mix
from shards.storage.location import Location
from shards.stream.loader import loader
from shards.stream.sample_cache import SampleCache
from shards.stream.streams import EvalStream, ShardStream


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_the_identity_is_json_for_numbers_of_any_kind(dataset: Dataset, kind: type) -> None:
    options: Any = {"batch_size": 4, "seed": 3, "lanes": 2, "window": 8}
    plain = ShardStream(dataset, "train", **options)
    given = ShardStream(dataset, "train", start=kind(2), **{name: kind(value) for name, value in options.items()})
    assert json.dumps(given.order.identity()) == json.dumps(plain.order.identity())
    assert given.start == 2
    numbers: Any = {"group_by_aspect": np.bool_(True), "repeat_threshold": np.float32(0.5)}
    other = OrderSettings(4, **numbers)
    assert json.dumps([other.group_by_aspect, other.repeat_threshold]) == "[true, 0.5]"


def train(dataset: Any, **options: Any) -> ShardStream:
    return ShardStream(dataset, "train", **({"batch_size": 4} | options))


def evaluate(dataset: Any, **options: Any) -> EvalStream:
    return EvalStream(dataset, "val", **({"batch_size": 2} | options))


# The calls below are wrong on purpose, so that types are not checked.
load: Any = loader
mix: Any = Mix
cache: Any = SampleCache
open_root: Any = open_dataset


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: train(d, seed=1.5), "order: seed is 1.5: give a whole number"),
        (lambda d: train(d, repeat_threshold="0.1"), "order: repeat_threshold is '0.1': give a number"),
        (lambda d: train(d, batch_size=4.0), "batch_size is 4.0: give a whole number"),
        (lambda d: train(d, rank="0", world=2), "rank is '0': give a whole number"),
        (lambda d: load(evaluate(d), workers=-1), "workers is -1: it must be 0 or more"),
        (lambda d: d.select(seed=1.5), "the seed of a selection is 1.5: give a whole number"),
        (lambda d: mix([d], ["3"]), "its weight in the mix is '3': give a number"),
        (lambda d: cache("x", "10GB"), "the limit of a cache, in bytes, is '10GB': give a number"),
        (lambda d: train("/data/streets"), "'/data/streets': open it first, open_dataset('/data/streets')"),
        (lambda d: train(Location("s3://bucket/streets")), "open it first, open_dataset('s3://bucket/streets')"),
        (lambda d: train([d, d]), "a list: give Mix(datasets, weights)"),
        (lambda d: train(None), "a NoneType: give what open_dataset returns"),
        (lambda d: evaluate(mix([d, d], [1, 1])), "a Mix: evaluate each of its datasets by itself"),
        (lambda d: evaluate([d, d]), "a list: evaluate one at a time"),
        (lambda d: open_root(None), "the root of a dataset is None: give a local path or a URL"),
        (lambda d: train(d, cache="/tmp/x"), "give SampleCache('/tmp/x', limit in bytes)"),
        (lambda d: train(d, parse=None), "give functions, or leave them out"),
        (lambda d: load(d), "a loader reads a stream, not a Dataset: give ShardStream(...)"),
        (lambda d: load(train(d), workers=1, start_method="thread"), "start_method is 'thread': give one of fork"),
        (lambda d: d.select(classes="Car"), "classes is 'Car': give a list, classes=['Car']"),
        (lambda d: mix(d, [1]), "a mix needs a list of datasets and one of weights"),
        (lambda d: mix(["/data"], [1]), "a mix holds '/data': give what open_dataset returns"),
        (lambda d: cache(None, 10**6), "the directory of a cache is None: give a local path"),
    ],
)
def test_wrong_arguments_are_one_line_with_a_remedy(dataset: Dataset, call: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        call(dataset)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_is_accepted_like_a_string(dataset: Dataset, tmp_path: Path) -> None:
    same = open_dataset(Path(dataset.root.url))
    assert same.root == dataset.root
    samples = SampleCache(tmp_path / "cache", 10**6)
    assert samples == SampleCache(str(tmp_path / "cache"), 10**6)
    assert len(next(iter(ShardStream(same, "train", batch_size=4, cache=samples)))) == 4
