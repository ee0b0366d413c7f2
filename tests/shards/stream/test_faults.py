"""The stream from S3 through a proxy that breaks requests: every sample still arrives exactly once and in order."""

import re
from collections.abc import Callable
from itertools import islice

import pytest

from demo.s3proxy import Fault, Kind
from demo.s3server import S3Server
from shards.common.errors import SampleError
from shards.format.dataset import Dataset
from shards.storage.location import Location
from shards.stream.loader import loader
from shards.stream.reader import SampleReader
from tests.shards.stream.support import EPOCH, SAMPLES, small_stream, take
from tests.support import Proxied, sample, write_dataset

TRANSIENT: tuple[Kind, ...] = ("slow_down", "internal_error", "reset", "truncate", "stall", "corrupt")
ONE_LINE = r"^[^\n]*train/0000\d\d\.tar: sample \w{16} at offset \d+[^\n]*$"


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_range_that_fails_twice_is_read_again(local: Dataset, remote: Dataset, proxied: Proxied, kind: Kind) -> None:
    # A busy machine may stall as well, any number of times.
    limits = {"timeout_s": 0.5, "attempts": 1000} if kind == "stall" else {}
    with proxied(Fault(kind, "GET", times=2, after=0.7), **limits) as proxy:
        assert take(small_stream(remote), EPOCH) == take(small_stream(local), EPOCH)
    assert proxy.counters.faults[kind] == 12  # twice for each of six shards


def test_wrong_bytes_are_read_five_times(remote: Dataset, proxied: Proxied) -> None:
    with proxied(Fault("corrupt", "GET", times=4, after=0.9)) as proxy:
        reader = SampleReader(remote.root, remote.index("train"))
        assert [row for row, _ in reader.read([0])] == [0]
    assert (proxy.counters.requests["GET"], reader.statistics.retries) == (5, 4)


def error_after(dataset: Dataset, change: Callable[[], None], workers: int) -> str:
    """The error of a stream that fails after its first batch."""
    batches = iter(loader(small_stream(dataset), workers=workers))
    next(batches)
    change()
    with pytest.raises(SampleError, match=ONE_LINE) as caught:
        list(islice(batches, 4 * EPOCH))
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "workers", "message"),
    [
        ("refuse", 2, "access was refused"),
        ("missing", 0, "no such object"),
        ("expired", 0, "token has expired"),
        ("slow_down", 0, "SlowDown"),
        ("corrupt", 0, r"crc32 is (\w+), the index says (?!\1)\w+, after 5 reads"),
        ("stall", 0, ""),
    ],
)
def test_a_permanent_fault_is_one_line(
    remote: Dataset, proxied: Proxied, kind: Kind, workers: int, message: str
) -> None:
    with proxied(timeout_s=0.5 if kind == "stall" else 60) as proxy:

        def break_all() -> None:
            proxy.faults = (Fault(kind, "GET", after=0.0),)

        assert re.search(message, error_after(remote, break_all, workers))
        if kind in ("refuse", "missing", "expired"):  # not tried again: only the ranges in flight fail
            assert proxy.counters.faults[kind] <= 16 * max(1, workers)


@pytest.mark.parametrize(
    ("change", "workers", "message"),
    [
        ("deleted", 0, "no such object"),
        ("replaced", 2, "build the dataset again"),
        ("truncated", 0, "ends at byte|not satisfiable|build the dataset again"),
    ],
)
def test_an_object_that_changes_while_it_is_read_is_one_line(
    s3: S3Server, bucket: str, proxied: Proxied, change: str, workers: int, message: str
) -> None:
    dataset = write_dataset(f"s3://{bucket}", {"train": [sample(n) for n in range(SAMPLES)]}, per_shard=10)
    content = Location(f"s3://{bucket}/train/000005.tar").read()
    content = content[:-1024] + bytes(1024) if change == "replaced" else content[:2000]
    with proxied():

        def swap() -> None:
            for number in range(6):
                key = f"{bucket}/train/{number:06}.tar"
                if change == "deleted":
                    s3.filesystem().rm_file(key)
                else:
                    s3.filesystem().pipe_file(key, content)

        assert re.search(message, error_after(dataset, swap, workers))
