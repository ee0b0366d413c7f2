import itertools
import json
import pickle

import pytest
import webdataset as wds

from shards.common.errors import DatasetError, SampleError
from shards.order.mixture import Mix
from shards.stream.loader import loader
from shards.stream.sample_decoders import webdataset_sample
from shards.stream.streams import EvalStream, ShardStream
from tests.support import sample, write_dataset


@pytest.fixture(scope="module")
def samples():
    return [sample(n) for n in range(30)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, samples):
    return write_dataset(
        tmp_path_factory.mktemp("data"), {"train": samples, "val": [sample(n) for n in range(100, 107)]}, per_shard=7
    )


def keys(batch, epoch=None):
    return tuple(s.image_id for s in batch)


def take(dataset, count, *, workers=0, **options):
    stream = ShardStream(dataset, "train", **({"batch_size": 4, "window": 8, "lanes": 3, "seed": 5} | options))
    return list(itertools.islice(loader(stream, workers=workers), count))


def test_samples_arrive_whole(dataset, samples):
    batches = take(dataset, 7)
    by_key = {s.image_id: s for s in samples}
    seen = [s for batch in batches for s in batch]
    assert len({s.image_id for s in seen}) == 28
    assert all(s == by_key[s.image_id] for s in seen)


@pytest.mark.parametrize("start", [1, 5, 7, 16])
def test_a_stream_resumes_at_any_position_with_other_workers(dataset, start):
    unbroken = [keys(batch) for batch in take(dataset, 20)]
    assert [keys(batch) for batch in take(dataset, 4, start=start, workers=2)] == unbroken[start : start + 4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 5}, "started with batch_size 4, now it is 5: its position means another batch here"),
        ({"seed": 6}, "started with seed 5, now it is 6"),
        ({"lanes": 2}, "started with lanes 3, now it is 2"),
        ({"repeat_threshold": 0.5}, r"started with repeat_threshold 0\.0, now it is 0\.5"),
    ],
)
def test_a_position_is_refused_under_another_order(dataset, changed, message):
    options = {"batch_size": 4, "window": 8, "lanes": 3, "seed": 5}
    saved = json.loads(json.dumps(ShardStream(dataset, "train", **options).order.identity()))
    ShardStream(dataset, "train", **options, rank=1, world=2, start=6, identity=saved)
    with pytest.raises(DatasetError, match=message):
        ShardStream(dataset, "train", **(options | changed), start=6, identity=saved)


def test_a_position_is_refused_with_other_samples(dataset):
    saved = ShardStream(dataset, "train", batch_size=4).order.identity()
    cars = dataset.select(classes=["Car"])
    with pytest.raises(
        DatasetError, match=rf"started with index \(the fingerprint [^\n]*\) '{saved['index']}', now it is '"
    ):
        ShardStream(cars, "train", batch_size=4, start=3, identity=saved)
    with pytest.raises(DatasetError, match=r"now it is \['"):
        ShardStream(Mix([dataset, dataset], [1, 1]), "train", batch_size=4, start=3, identity=saved)
    with pytest.raises(DatasetError, match=r"identity is '\{\}': give what order\.identity\(\) returned"):
        ShardStream(dataset, "train", batch_size=4, identity="{}")


def test_the_epoch_reaches_collate(dataset):
    epochs = take(dataset, 15, collate=lambda batch, epoch: epoch)
    assert epochs == [0] * 7 + [1] * 7 + [2]


def test_evaluation_sees_every_sample_once_over_ranks_and_workers(dataset):
    seen = [
        key
        for rank in range(3)
        for batch in loader(EvalStream(dataset, "val", batch_size=2, rank=rank, world=3), workers=2)
        for key in keys(batch)
    ]
    assert sorted(seen) == [f"{n:016x}" for n in range(100, 107)]


def test_a_stream_can_be_sent_to_another_process(dataset):
    stream = ShardStream(dataset, "train", batch_size=4)
    copy = pickle.loads(pickle.dumps(stream))  # noqa: S301 (our own bytes, made here)
    assert [keys(b) for b in itertools.islice(copy, 3)] == [keys(b) for b in itertools.islice(stream, 3)]


@pytest.mark.slow
def test_spawned_loader_processes_give_the_same_batches(dataset):
    stream = ShardStream(dataset, "train", batch_size=4, window=8, lanes=3, seed=5)
    batches = list(itertools.islice(loader(stream, workers=1, start_method="spawn"), 3))
    assert [keys(b) for b in batches] == [keys(b) for b in take(dataset, 3)]


def test_an_error_in_a_loader_process_arrives_as_itself(tmp_path, samples, monkeypatch):
    monkeypatch.setattr("shards.common.back_off.SCALE", 0)
    broken = write_dataset(tmp_path, {"train": samples})
    (tmp_path / "train" / "000002.tar").unlink()
    with pytest.raises(SampleError, match=r"^[^\n]*train/000002.tar: sample \w+ at offset \d+: cannot be read[^\n]*$"):
        list(itertools.islice(loader(ShardStream(broken, "train", batch_size=4), workers=2), 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 31}, r"30 samples, fewer than one batch of 31 on each of 1 rank: lower the batch size"),
        ({"batch_size": 16, "world": 2}, r"fewer than one batch of 16 on each of 2 ranks"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank 2 of 2"),
        ({"batch_size": 4, "start": -1}, "start is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 4, "read_ahead": 2000}, r"read_ahead is 2000 bytes, twice the largest sample is \d{4}: give"),
        ({"batch_size": 4, "read_ahead": 0}, "read_ahead is 0 bytes"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(dataset, options, message):
    with pytest.raises(DatasetError, match=message):
        ShardStream(dataset, "train", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 1}, "rank 1 of 1"),
        ({"read_ahead": 9}, "read_ahead is 9 bytes"),
    ],
)
def test_evaluation_that_cannot_work_is_refused_at_the_start(dataset, options, message):
    with pytest.raises(DatasetError, match=message):
        EvalStream(dataset, "val", **({"batch_size": 2} | options))


def test_a_stream_is_the_source_of_a_webdataset_pipeline(dataset):
    stream = ShardStream(dataset, "train", batch_size=4, seed=5, parse=webdataset_sample)
    pipeline = wds.DataPipeline(
        stream, wds.filters.unlisted(), wds.decode("pil"), wds.to_tuple("__key__", "jpg", "json")
    )
    got = list(itertools.islice(pipeline, 8))
    expected = list(itertools.islice(ShardStream(dataset, "train", batch_size=4, seed=5), 2))
    assert [key for key, _, _ in got] == [s.image_id for batch in expected for s in batch]
    assert all(picture.size == (value["width"], value["height"]) for _, picture, value in got)
