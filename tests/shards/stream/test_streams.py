import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from shards.common.errors import DatasetError
from shards.format.dataset import Dataset
from shards.order.mixture import Mix
from shards.stream.loader import loader
from shards.stream.sample_decoders import webdataset_sample
from shards.stream.streams import EvalStream
from tests.shards.stream.support import keys, small_stream
from tests.shards.stream.support import take as take_from
from tests.support import sample


def take(dataset: Dataset, count: int, *, workers: int = 0, **options: Any) -> list[Any]:
    return take_from(small_stream(dataset, **options), count, workers)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 5}, "started with batch_size 4, now it is 5: its position means another batch here"),
        ({"seed": 6}, "started with seed 3, now it is 6"),
        ({"lanes": 2}, "started with lanes 3, now it is 2"),
        ({"repeat_threshold": 0.5}, r"started with repeat_threshold 0\.0, now it is 0\.5"),
        ({"identity": "{}"}, r"identity is '\{\}': give what order\.identity\(\) returned"),
        ({"dataset": lambda one: one.select(classes=["Car"])}, "now it is '"),
        ({"dataset": lambda one: Mix([one, one], [1, 1])}, r"now it is \['"),
    ],
)
def test_a_position_is_refused_under_another_order_or_with_other_samples(
    dataset: Dataset, changed: dict, message: str
) -> None:
    saved = json.loads(json.dumps(small_stream(dataset).order.identity()))
    small_stream(dataset, rank=1, world=2, start=6, identity=saved)
    if "dataset" in changed:
        changed = {"dataset": changed["dataset"](dataset)}
        message = rf"started with index \(the fingerprint [^\n]*\) '{saved['index']}', {message}"
    with pytest.raises(DatasetError, match=message):
        small_stream(**{"dataset": dataset, "start": 6, "identity": saved, **changed})


def test_samples_arrive_complete_and_collate_receives_the_epoch(dataset: Dataset) -> None:
    seen = [one for batch in take(dataset, 10) for one in batch]
    assert sorted(seen, key=lambda one: one.image_id) == [sample(n) for n in range(40)]
    assert take(dataset, 21, collate=lambda batch, epoch: epoch) == [0] * 10 + [1] * 10 + [2]


@pytest.mark.parametrize("rows", [None, [0, 2, 3, 4, 6]])
def test_evaluation_visits_every_sample_once_over_ranks_and_workers(dataset: Dataset, rows: list[int] | None) -> None:
    chosen = None if rows is None else np.array(rows)
    streams = [EvalStream(dataset, "val", batch_size=2, rank=rank, world=3, rows=chosen) for rank in range(3)]
    batches = [list(loader(one, workers=2)) for one in streams]
    seen = [key for own in batches for batch in own for key in keys(batch)]
    assert sorted(seen) == [f"{100 + n:016x}" for n in (rows or range(7))]
    assert [len(one) for one in streams] == [len(loader(one)) for one in streams] == [len(own) for own in batches]


def test_streams_and_loaders_show_what_they_read_and_an_endless_one_has_no_length(dataset: Dataset) -> None:
    shown = f"ShardStream({dataset.root}, 'train', batch_size=4, rank 1 of 2)"
    endless = loader(small_stream(dataset, rank=1, world=2), workers=3)
    assert repr(endless) == f"Loader({shown}, workers=3)"
    assert repr(EvalStream(dataset, "val", batch_size=2)).startswith(f"EvalStream({dataset.root}, 'val', batch_size=2")
    with pytest.raises(TypeError, match="has no len"):
        len(endless)


@pytest.mark.slow
def test_spawned_loader_processes_yield_the_same_batches(dataset: Dataset) -> None:
    spawned = loader(small_stream(dataset, stages=[with_size]), workers=1, start_method="spawn")
    assert [keys(b) for b in itertools.islice(spawned, 3)] == [keys(b) for b in take(dataset, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 41}, r"40 samples, fewer than one batch of 41 on each of 1 rank: lower the batch size"),
        ({"batch_size": 21, "world": 2}, r"fewer than one batch of 21 on each of 2 ranks"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"start": -1}, "start is -1"),
        ({"read_ahead": 2000}, r"read_ahead is 2000 bytes, twice the largest sample is \d+: give"),
        ({"stages": wds.map(len)}, r"stages is [^\n]*: give a list of webdataset stages"),
        ({"stall_s": float("nan")}, "^stall_s is nan: it must be a number of seconds above 0$"),
    ],
)
def test_wrong_arguments_are_refused_at_once(dataset: Dataset, options: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        small_stream(dataset, **options)
    if "start" not in options and "fewer than one batch" not in message:
        with pytest.raises(DatasetError, match=message):
            EvalStream(dataset, "val", **({"batch_size": 2} | options))


def with_size(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A stage as webdataset's documentation shows it."""
    for one in samples:
        one["size"] = len(one["jpg"])
        yield one


@pytest.mark.parametrize("workers", [0, 2])
def test_stages_change_samples_and_not_the_order(dataset: Dataset, workers: int) -> None:
    stages = [with_size, wds.map(lambda one: {**one, "twice": 2 * one["size"]})]
    plain = take(dataset, 8)
    batches = take(dataset, 8, workers=workers, stages=stages, parse=webdataset_sample)
    assert [[one["__key__"] for one in batch] for batch in batches] == [list(keys(batch)) for batch in plain]
    for batch, expected in zip(batches, plain):
        assert [one["twice"] for one in batch] == [2 * len(s.image) for s in expected]
        assert all(one["__url__"].startswith(f"{dataset.root}/train/") for one in batch)
    assert take(dataset, 8, workers=workers, stages=stages) == plain
    for parse in (lambda one: {"image": one["jpg"]}, lambda one: None):  # it may return anything
        expected = [[parse({"jpg": one.image}) for one in batch] for batch in plain]
        assert take(dataset, 8, parse=parse) == expected


def test_stages_see_the_annotations_of_chosen_classes_only(dataset: Dataset) -> None:
    def annotated(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for one in samples:
            assert {a["category_id"] for a in json.loads(one["json"])["annotations"]} == {2}
            yield one

    cars = dataset.select(classes=["Car"])
    assert take(cars, 3, stages=[annotated]) == take(cars, 3)


@pytest.mark.parametrize(
    "stage",
    [
        wds.select(lambda one: int(one["__key__"], 16) % 3),
        wds.map(lambda one: None),
        wds.shuffle(8),
        lambda samples: (one for one in samples for _ in range(2)),
        lambda samples: itertools.islice(samples, 5),
    ],
    ids=["select", "none", "shuffle", "twice", "end"],
)
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_stage_that_does_not_yield_one_sample_for_each_is_refused(
    dataset: Dataset, stage: Any, evaluation: bool
) -> None:
    options: Any = {"batch_size": 4, "stages": [stage]}
    stream = EvalStream(dataset, "val", **options) if evaluation else small_stream(dataset, **options)
    with pytest.raises(DatasetError, match="must yield one sample for each, in order"):
        take_from(stream, 20)


def test_a_stream_is_the_source_of_a_webdataset_pipeline(dataset: Dataset) -> None:
    pipeline = wds.DataPipeline(
        small_stream(dataset, parse=webdataset_sample),
        wds.filters.unlisted(),
        wds.decode("pil"),
        wds.to_tuple("__key__", "jpg", "json"),
    )
    got = list(itertools.islice(pipeline, 8))
    assert [key for key, _, _ in got] == [s.image_id for batch in take(dataset, 2) for s in batch]
    assert all(picture.size == (value["width"], value["height"]) for _, picture, value in got)
