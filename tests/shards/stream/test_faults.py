"""The stream from S3 through a proxy that breaks requests: what can be had arrives exactly once and in order."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator

import pytest

from demo.s3proxy import Fault, Kind, S3Proxy
from demo.s3server import S3Server
from shards.common.errors import SampleError
from shards.format.dataset import Dataset, open_dataset
from shards.format.sample import Sample
from shards.storage.location import Location
from shards.stream.loader import loader
from shards.stream.reader import SampleReader
from shards.stream.streams import ShardStream
from tests.support import sample, write_dataset

EPOCHS = 5
TRANSIENT: tuple[Kind, ...] = ("slow_down", "internal_error", "reset", "truncate", "stall", "corrupt")
ONE_LINE = r"^[^\n]*train/0000\d\d\.tar: sample \w{16} at offset \d+[^\n]*$"


@pytest.fixture(scope="module")
def root(s3: S3Server) -> Iterator[str]:
    """A dataset of 60 samples in 6 shards on S3."""
    s3.make_bucket("faulty-stream")
    write_dataset("s3://faulty-stream/data", {"train": [sample(n) for n in range(60)]}, per_shard=10)
    yield "s3://faulty-stream/data"
    s3.filesystem().rm("faulty-stream", recursive=True)


def stream(dataset: Dataset) -> ShardStream[list[Sample]]:
    # Little read-ahead: many ranges, and most of the dataset is still to be fetched when a test changes it.
    return ShardStream(dataset, "train", batch_size=4, seed=3, lanes=3, window=8, read_ahead=30_000)


@pytest.fixture(scope="module")
def expected(root: str) -> list[list[Sample]]:
    """The batches of five epochs when nothing goes wrong."""
    epochs = stream(open_dataset(root))
    return list(itertools.islice(epochs, EPOCHS * epochs.batches_per_epoch))


def test_five_epochs_hold_every_sample_once_each(expected: list[list[Sample]]) -> None:
    for epoch in range(EPOCHS):
        batches = expected[epoch * 15 : (epoch + 1) * 15]
        assert len({sample.image_id for batch in batches for sample in batch}) == 60


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_transient_faults_change_nothing(
    s3: S3Server, root: str, expected: list[list[Sample]], through: Callable, workers: int
) -> None:
    dataset = open_dataset(root)
    faults = [Fault(kind, "GET", share=0.01 if kind == "stall" else 0.04) for kind in TRANSIENT]
    with S3Proxy(s3.endpoint_url, faults, seed=workers) as proxy:
        through(proxy)
        got = list(itertools.islice(loader(stream(dataset), workers=workers), len(expected)))
    assert got == expected
    assert set(proxy.counters.faults) == set(TRANSIENT)


@pytest.mark.parametrize("kind", TRANSIENT)
def test_every_range_fails_twice(
    s3: S3Server, root: str, expected: list[list[Sample]], through: Callable, kind: Kind
) -> None:
    dataset = open_dataset(root)
    with S3Proxy(s3.endpoint_url, [Fault(kind, "GET", times=2, after=0.7)]) as proxy:
        through(proxy)
        assert list(itertools.islice(stream(dataset), 15)) == expected[:15]
    assert proxy.counters.faults[kind] == 12  # twice for each of six shards


def test_a_broken_range_is_continued_where_it_broke(s3: S3Server, root: str, through: Callable) -> None:
    """The end of a range is asked for again, not the whole."""
    dataset = open_dataset(root)
    with S3Proxy(s3.endpoint_url, [Fault("truncate", "GET", times=1, after=0.5)]) as proxy:
        through(proxy)
        index = dataset.index("train")
        assert len(list(SampleReader(dataset.root, index).read(range(60)))) == 60
        assert proxy.counters.faults["truncate"] == 6
        assert proxy.counters.sent < 1.1 * int(index.nbytes.sum())


@pytest.mark.parametrize("wrong", [4, 5])
def test_wrong_bytes_are_read_five_times(s3: S3Server, root: str, through: Callable, wrong: int) -> None:
    """The last time counts as well, and the error tells what came."""
    dataset = open_dataset(root)
    with S3Proxy(s3.endpoint_url, [Fault("corrupt", "GET", times=wrong, after=0.9)]) as proxy:
        through(proxy)
        reader = SampleReader(dataset.root, dataset.index("train"))
        if wrong < 5:
            assert [row for row, _ in reader.read([0])] == [0]
        else:
            with pytest.raises(SampleError, match=r"crc32 is (\w+), the index says (?!\1)\w+, after 5 reads"):
                list(reader.read([0]))
    assert proxy.counters.requests["GET"] == 5
    assert reader.statistics.retries == 4


def stops(dataset: Dataset, change: Callable[[], None], workers: int) -> str:
    """The error of a stream after `change` happened behind its back; a test fails when none comes in 20 s."""
    batches = iter(loader(stream(dataset), workers=workers))
    next(batches)
    change()
    started = time.monotonic()
    with pytest.raises(SampleError, match=ONE_LINE) as caught:
        for _ in itertools.islice(batches, 60):
            pass
    assert time.monotonic() - started < 20
    return str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "message"),
    [("refuse", "access was refused"), ("missing", "no such object"), ("expired", "token has expired")],
)
def test_what_is_refused_from_some_moment_on_stops_with_one_line(
    s3: S3Server, root: str, through: Callable, kind: Kind, message: str, workers: int
) -> None:
    dataset = open_dataset(root)
    with S3Proxy(s3.endpoint_url) as proxy:
        through(proxy)

        def refuse() -> None:
            proxy.faults = (Fault(kind, "GET"),)

        assert message in stops(dataset, refuse, workers)
        assert proxy.counters.faults[kind] <= 16 * max(1, workers)  # asked in vain by the ranges in flight, no more


@pytest.mark.parametrize("kind", ["slow_down", "reset", "corrupt", "stall"])
def test_what_never_gets_better_stops_with_one_line(s3: S3Server, root: str, through: Callable, kind: Kind) -> None:
    dataset = open_dataset(root)
    with S3Proxy(s3.endpoint_url) as proxy:
        through(proxy)

        def break_all() -> None:
            proxy.faults = (Fault(kind, "GET", after=0.0),)

        stops(dataset, break_all, workers=0)


@pytest.mark.parametrize(("change", "workers"), [("deleted", 0), ("replaced", 2), ("replaced by a shorter one", 0)])
def test_an_object_that_changes_during_reading_stops_with_one_line(
    s3: S3Server, bucket: str, through: Callable, change: str, workers: int
) -> None:
    dataset = write_dataset(f"s3://{bucket}", {"train": [sample(n) for n in range(60)]}, per_shard=10)
    other = Location(f"s3://{bucket}/train/000005.tar").read()
    content = other[:-1024] + bytes(1024) if change == "replaced" else other[:2000]
    with S3Proxy(s3.endpoint_url) as proxy:
        through(proxy)

        def swap() -> None:
            for number in range(6):
                key = f"{bucket}/train/{number:06}.tar"
                if change == "deleted":
                    s3.filesystem().rm_file(key)
                else:
                    s3.filesystem().pipe_file(key, content)

        text = stops(dataset, swap, workers)
    said = {"deleted": "no such object", "replaced": "build the dataset again"}
    assert re.search(said.get(change, "ends at byte|not satisfiable|build the dataset again"), text)
