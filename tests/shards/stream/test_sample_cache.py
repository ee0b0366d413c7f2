"""The cache on a disk of the machine: what it serves is right, it keeps its limit, and it may break."""

from __future__ import annotations

import fcntl
import itertools
import logging
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.s3proxy import Fault, S3Proxy
from demo.s3server import S3Server
from shards.common.errors import StorageError
from shards.format.dataset import Dataset, open_dataset
from shards.format.sample import Sample
from shards.stream.loader import Loader, loader
from shards.stream.sample_cache import SampleCache
from shards.stream.streams import ShardStream
from tests.support import sample, write_dataset

SAMPLES, BATCH = 60, 4
ROOM = 10 * 2**20


@pytest.fixture(scope="module")
def root(s3: S3Server) -> Iterator[str]:
    """A dataset of 60 samples in 6 shards on S3."""
    s3.make_bucket("cached-stream")
    write_dataset("s3://cached-stream/data", {"train": [sample(n) for n in range(SAMPLES)]}, per_shard=10)
    yield "s3://cached-stream/data"
    s3.filesystem().rm("cached-stream", recursive=True)


def stream(dataset: Dataset, cache: SampleCache | None) -> ShardStream[list[Sample]]:
    return ShardStream(dataset, "train", batch_size=BATCH, seed=3, lanes=3, window=8, read_ahead=30_000, cache=cache)


def epochs(dataset: Dataset, cache: SampleCache | None, count: int, workers: int = 0) -> tuple[list, Loader]:
    batches = loader(stream(dataset, cache), workers=workers)
    return list(itertools.islice(batches, count * SAMPLES // BATCH)), batches


def files(directory: Path) -> list[Path]:
    """Of samples."""
    return sorted(path for path in directory.glob("samples/??/*"))


def taken(directory: Path) -> int:
    """Bytes of the samples, in blocks of 4096."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files(directory))


@pytest.mark.parametrize("workers", [0, 2])
def test_after_the_first_epoch_nothing_is_asked_for(
    s3: S3Server, root: str, tmp_path: Path, through: Callable, workers: int
) -> None:
    dataset = open_dataset(root)
    expected, plain = epochs(dataset, None, 3)
    assert plain.statistics.cache_hits == 0
    with S3Proxy(s3.endpoint_url) as proxy:
        through(proxy)
        first, filling = epochs(dataset, SampleCache(str(tmp_path), ROOM), 1, workers)
        requests = proxy.counters.requests.total()
        # In a new run, with other workers, all comes from the cache.
        rest, filled = epochs(dataset, SampleCache(str(tmp_path), ROOM), 3, 2 - workers)
        assert proxy.counters.requests.total() == requests > 0
    assert (first, rest) == (expected[:15], expected)
    assert filling.statistics.cache_hits <= 2 * BATCH * workers  # who is ahead begins the next epoch
    assert (filled.statistics.samples, filled.statistics.cache_hits) == (3 * SAMPLES, 3 * SAMPLES)
    assert (filled.statistics.requests, filled.statistics.nbytes) == (0, 0)
    assert len(files(tmp_path)) == SAMPLES
    assert taken(tmp_path) <= ROOM


def test_damaged_samples_are_fetched_again_and_mended(root: str, tmp_path: Path) -> None:
    dataset = open_dataset(root)
    expected, _ = epochs(dataset, SampleCache(str(tmp_path), ROOM), 1)
    whole = {path: path.read_bytes() for path in files(tmp_path)}
    damages: list[Callable[[bytes], bytes]] = [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:1000],
        lambda data: b"",
        lambda data: data + b"x",
    ]
    for (path, data), damage in zip(whole.items(), itertools.cycle(damages)):
        path.write_bytes(damage(data))
    got, batches = epochs(dataset, SampleCache(str(tmp_path), ROOM), 1)
    assert got == expected
    assert batches.statistics.cache_hits == 0
    assert {path: path.read_bytes() for path in files(tmp_path)} == whole


def test_a_dataset_that_was_built_again_keeps_what_has_not_changed(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    samples = [sample(n) for n in range(SAMPLES)]
    before = write_dataset(f"s3://{bucket}", {"train": samples}, per_shard=10)
    epochs(before, SampleCache(str(tmp_path), ROOM), 1)
    samples[-10:] = [sample(n, width=64) for n in range(SAMPLES - 10, SAMPLES)]  # the same keys, other pictures
    after = write_dataset(f"s3://{bucket}", {"train": samples}, per_shard=10)
    expected, _ = epochs(after, None, 1)
    got, batches = epochs(after, SampleCache(str(tmp_path), ROOM), 1)
    assert got == expected
    assert batches.statistics.cache_hits == SAMPLES - 10


def test_a_stream_goes_on_when_its_cache_is_lost(root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Entries vanish between the plan and the read, then the whole folder does."""
    dataset = open_dataset(root)
    expected, _ = epochs(dataset, None, 2)
    cache = SampleCache(str(tmp_path), ROOM)
    epochs(dataset, cache, 1)
    batches = iter(loader(stream(dataset, cache)))
    got = [next(batches)]
    for path in files(tmp_path):
        path.unlink()
    got += itertools.islice(batches, 14)
    assert len(files(tmp_path)) > SAMPLES // 2
    (tmp_path / "samples").rename(tmp_path / "gone")
    got += itertools.islice(batches, 15)
    assert got == expected
    (told,) = caplog.records
    assert "the run continues, this process stores nothing more" in told.message


def test_a_full_disk_is_told_once(root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_dataset(root)
    expected, _ = epochs(dataset, None, 2)
    cache = SampleCache(str(tmp_path), ROOM)
    (tmp_path / "samples" / "incoming").symlink_to("/dev/full")
    got, _ = epochs(dataset, cache, 2)
    assert got == expected
    assert files(tmp_path) == []
    (told,) = caplog.records
    assert "No space left on device" in told.message
    assert "this process stores nothing more" in told.message


def test_a_disk_that_cannot_even_be_asked_is_told_once(tmp_path: Path) -> None:
    cache = SampleCache(str(tmp_path), ROOM)
    cache.put(name(0), b"x" * 100)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=use_what_is_refused, args=(cache, theirs))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    tmp_path.chmod(0o700)
    assert ours.recv() == [f"cache {tmp_path}: cannot be written"]


def use_what_is_refused(cache: SampleCache, told: Any) -> None:
    """As a user who may not enter its folder: a failing disk answers no question, either."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage().split(" (")[0])  # type: ignore[method-assign]
    logging.getLogger("shards.stream.sample_cache").addHandler(handler)
    os.chmod(cache.directory, 0)
    if os.geteuid() == 0:
        os.setuid(65534)
    for number in (1, 2):
        cache.put(name(number), b"y" * 100)
    assert not cache.has(name(0))
    assert cache.get(name(0)) is None
    told.send(lines)


def test_samples_on_a_local_disk_are_not_copied(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", {"train": [sample(n) for n in range(SAMPLES)]})
    _, batches = epochs(dataset, SampleCache(str(tmp_path / "cache"), ROOM), 2)
    assert batches.statistics.cache_hits == 0
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("directory", "limit", "message"),
    [
        ("s3://bucket/cache", ROOM, "a cache is on a disk of this machine: give a local path"),
        ("{tmp}/file/below", ROOM, "cannot be used .Not a directory.: give another folder, or none"),
        ("{tmp}", 0, "its limit is 0 bytes"),
    ],
)
def test_what_cannot_be_a_cache_is_refused(tmp_path: Path, directory: str, limit: int, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=message):
        SampleCache(directory.format(tmp=tmp_path), limit)


def name(number: int) -> str:
    return random.Random(number).randbytes(16).hex()


def read_through(cache: SampleCache, names: list[str], nbytes: int = 10_000) -> int:
    """How many were there; the others are stored."""
    hits = 0
    for key in names:
        if cache.has(key) and cache.get(key) is not None:
            hits += 1
        else:
            cache.put(key, key.encode() * (nbytes // 32))
    return hits


def test_a_full_cache_serves_its_share_of_every_epoch(tmp_path: Path) -> None:
    """Of a dataset twice its size; dropping the least recently used would serve 15 % of an epoch."""
    names = [name(n) for n in range(600)]
    limit = 300 * 3 * 4096
    cache = SampleCache(str(tmp_path), limit)
    hits = []
    for epoch in range(4):
        random.Random(-epoch).shuffle(names)
        hits.append(read_through(cache, names))
        assert 0.9 * limit <= taken(tmp_path) <= limit
    assert hits[0] == 0
    assert all(0.45 * 600 <= count <= 0.5 * 600 for count in hits[2:]), hits


def test_what_was_not_used_for_a_day_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = ([name(n) for n in range(first, first + 200)] for first in (0, 1000))
    cache = SampleCache(str(tmp_path), 200 * 3 * 4096)
    read_through(cache, old)
    # Both in use: each keeps about half.
    read_through(cache, new)
    assert 70 < sum(map(cache.has, old)) < 130
    # The old ones are not any more.
    day_ago = time.time() - 25 * 3600
    for key in old:
        if cache.has(key):
            os.utime(cache._path(key), (day_ago, day_ago))
    later = time.time() + 2 * 3600
    monkeypatch.setattr("shards.stream.sample_cache.time.time", lambda: later)
    read_through(cache, new)
    assert read_through(cache, new) >= 190
    assert taken(tmp_path) <= cache.limit


def test_who_holds_the_lock_for_long_holds_up_no_one(tmp_path: Path) -> None:
    cache = SampleCache(str(tmp_path), ROOM)
    cache.put(name(0), b"x" * 100)
    with open(tmp_path / "samples" / "state", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        began = time.monotonic()
        cache.put(name(1), b"y" * 100)
        assert time.monotonic() - began < 5
        assert cache.get(name(0)) == b"x" * 100
        assert cache.get(name(1)) is None
    cache.put(name(1), b"y" * 100)
    assert cache.get(name(1)) == b"y" * 100


def write_on(cache: SampleCache, seed: int, told: Any) -> None:
    """Until it is killed."""
    numbers = random.Random(seed)
    for count in itertools.count():
        key = numbers.randbytes(16).hex()
        cache.put(key, key.encode() * numbers.randrange(1, 2000))
        if count % 50 == 0:
            told.send(count)


def test_writers_that_are_killed_leave_whole_samples_within_the_limit(tmp_path: Path) -> None:
    limit, largest = 4 * 2**20, 64_000
    fork = multiprocessing.get_context("fork")
    writers: list[tuple[Any, Any]] = []
    for seed in range(20):
        ours, theirs = fork.Pipe()
        cache = SampleCache(str(tmp_path), limit)  # a new run: whatever it finds, it begins
        writers.append((fork.Process(target=write_on, args=(cache, seed, theirs)), ours))
        writers[-1][0].start()
        for _ in range(3):
            ours.recv()
        # At any moment three write, and the oldest is killed in the middle of it.
        if len(writers) > 2:
            writers[-3][0].kill()
            writers[-3][0].join()
        assert within(tmp_path) <= limit + largest
    for writer, _ in writers[-2:]:
        writer.kill()
        writer.join()
    assert 0.8 * limit < taken(tmp_path) <= limit
    for path in files(tmp_path):
        data = path.read_bytes()
        assert data == path.name.encode() * (len(data) // 32)
    # The next run may give it less room.
    cache = SampleCache(str(tmp_path), limit // 2)
    assert taken(tmp_path) <= limit // 2
    assert all(cache.get(path.name) is not None for path in files(tmp_path))


def within(directory: Path) -> int:
    """What is taken while others write and remove."""
    total = 0
    for path in [*directory.glob("samples/??/*"), directory / "samples" / "incoming"]:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_faults_and_a_cache_change_nothing(s3: S3Server, root: str, tmp_path: Path, through: Callable) -> None:
    """A small cache, wrong bytes from storage, several workers: every sample once an epoch, and right."""
    dataset = open_dataset(root)
    expected, _ = epochs(dataset, None, 3)
    faults = [Fault("corrupt", "GET", share=0.1), Fault("truncate", "GET", share=0.1), Fault("slow_down", share=0.05)]
    with S3Proxy(s3.endpoint_url, faults) as proxy:
        through(proxy)
        got, batches = epochs(dataset, SampleCache(str(tmp_path), SAMPLES * 4096 // 2), 3, workers=2)
    assert got == expected
    assert batches.statistics.cache_hits > SAMPLES // 2
    assert batches.statistics.retries > 0
    assert taken(tmp_path) <= SAMPLES * 4096 // 2
