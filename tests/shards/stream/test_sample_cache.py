import fcntl
import itertools
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from demo.s3proxy import Fault
from shards.common.errors import StorageError
from shards.format.dataset import Dataset
from shards.stream.loader import Loader, loader
from shards.stream.sample_cache import SampleCache
from tests.shards.stream.support import BATCH, EPOCH, SAMPLES, small_stream
from tests.support import Proxied, sample, write_dataset

ROOM = 10 * 2**20


def epochs(dataset: Dataset, cache: SampleCache | None, count: int = 1, workers: int = 0) -> tuple[list, Loader]:
    batches = loader(small_stream(dataset, cache=cache), workers=workers)
    return list(itertools.islice(batches, count * EPOCH)), batches


@pytest.fixture
def cache(tmp_path: Path) -> SampleCache:
    return SampleCache(str(tmp_path), ROOM)


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("samples/??/*"))


def taken(directory: Path) -> int:
    """Bytes of the samples, in blocks of 4096."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files(directory))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_requested_after_the_first_epoch(
    local: Dataset, remote: Dataset, tmp_path: Path, cache: SampleCache, proxied: Proxied, workers: int
) -> None:
    expected, plain = epochs(local, cache, 2)
    assert (plain.statistics.cache_hits, files(tmp_path)) == (0, [])  # samples on a local disk are not copied
    with proxied() as proxy:
        first, filling = epochs(remote, cache, 1, workers)
        requests = proxy.counters.requests.total()
        # Another run, with another number of workers, reads from the cache alone.
        rest, filled = epochs(remote, cache, 2, 2 - workers)
        assert proxy.counters.requests.total() == requests > 0
    assert (first, rest) == (expected[:EPOCH], expected)
    assert filling.statistics.cache_hits <= 2 * BATCH * workers  # a worker that is ahead starts the next epoch
    done = filled.statistics
    assert (done.samples, done.cache_hits, done.requests, done.nbytes) == (2 * SAMPLES, 2 * SAMPLES, 0, 0)
    assert len(files(tmp_path)) == SAMPLES
    assert taken(tmp_path) <= ROOM


def test_damaged_samples_are_fetched_again_and_replaced(remote: Dataset, tmp_path: Path, cache: SampleCache) -> None:
    expected, _ = epochs(remote, cache)
    intact = {path: path.read_bytes() for path in files(tmp_path)}
    for number, (path, data) in enumerate(intact.items()):
        path.write_bytes((data[:-1] + bytes([data[-1] ^ 1]), data[:1000], b"", data + b"x")[number % 4])
    got, batches = epochs(remote, cache)
    assert got == expected
    assert batches.statistics.cache_hits == 0
    assert {path: path.read_bytes() for path in files(tmp_path)} == intact


def test_unchanged_samples_of_a_rebuilt_dataset_are_still_found(bucket: str, cache: SampleCache) -> None:
    samples = [sample(n) for n in range(SAMPLES)]
    before = write_dataset(f"s3://{bucket}", {"train": samples}, per_shard=10)
    epochs(before, cache)
    samples[-10:] = [sample(n, width=64) for n in range(SAMPLES - 10, SAMPLES)]  # the same keys, other pictures
    after = write_dataset(f"s3://{bucket}", {"train": samples}, per_shard=10)
    got, batches = epochs(after, cache)
    assert got == epochs(after, None)[0]
    assert batches.statistics.cache_hits == SAMPLES - 10


def test_a_stream_continues_when_its_cache_is_lost_or_full(
    local: Dataset, remote: Dataset, tmp_path: Path, cache: SampleCache, caplog: pytest.LogCaptureFixture
) -> None:
    """Files vanish between the plan and the read, then the whole folder does; the disk of the second cache is full."""
    epochs(remote, cache)
    batches = iter(loader(small_stream(remote, cache=cache)))
    got = [next(batches)]
    for path in files(tmp_path):
        path.unlink()
    got += itertools.islice(batches, EPOCH - 1)
    assert len(files(tmp_path)) > SAMPLES // 2
    (tmp_path / "samples").rename(tmp_path / "gone")
    got += itertools.islice(batches, EPOCH)
    assert got == epochs(local, None, 2)[0]
    full = SampleCache(str(tmp_path / "full"), ROOM)
    (tmp_path / "full" / "samples" / "incoming").symlink_to("/dev/full")
    assert epochs(remote, full)[0] == got[:EPOCH]
    assert files(tmp_path / "full") == []
    lost, no_space = caplog.messages  # each once
    assert "the run continues, this process stores nothing more" in lost
    assert "No space left on device): the run continues, this process stores nothing more" in no_space


def test_a_disk_that_cannot_be_read_is_logged_once(
    tmp_path: Path, cache: SampleCache, caplog: pytest.LogCaptureFixture
) -> None:
    broken = cache._path(name(0))
    broken.mkdir()  # which can neither be read nor removed as a file
    assert not cache.has(name(0))
    assert cache.get(name(0)) is None
    cache.drop(name(0))
    cache.put(name(1), b"y" * 100)
    assert files(tmp_path) == [broken]  # nothing more is stored
    (record,) = caplog.records
    assert record.message.startswith(f"cache {tmp_path}: cannot be read ([Errno 21] Is a directory")


@pytest.mark.parametrize(
    ("directory", "limit", "message"),
    [
        ("s3://bucket/cache", ROOM, "a cache is on a disk of this machine: give a local path"),
        ("{tmp}/file/below", ROOM, "cannot be used .Not a directory.: give another folder, or none"),
        ("{tmp}", 0, "its limit is 0 bytes"),
    ],
)
def test_a_wrong_folder_or_limit_is_refused(tmp_path: Path, directory: str, limit: int, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=message):
        SampleCache(directory.format(tmp=tmp_path), limit)


def name(number: int) -> str:
    return random.Random(number).randbytes(16).hex()


def read_through(cache: SampleCache, names: list[str], nbytes: int = 10_000) -> int:
    """Return how many were in the cache; the others are stored."""
    hits = 0
    for key in names:
        if cache.has(key) and cache.get(key) is not None:
            hits += 1
        else:
            cache.put(key, key.encode() * (nbytes // 32))
    return hits


def test_a_full_cache_serves_its_share_of_every_epoch(tmp_path: Path) -> None:
    """Half of a dataset of twice its size; dropping the least recently used would serve 15 % of an epoch."""
    names = [name(n) for n in range(300)]
    limit = 150 * 3 * 4096
    cache = SampleCache(str(tmp_path), limit)
    hits = []
    for epoch in range(4):
        random.Random(-epoch).shuffle(names)
        hits.append(read_through(cache, names))
        assert 0.9 * limit <= taken(tmp_path) <= limit
    assert hits[0] == 0
    assert all(0.45 * 300 <= count <= 0.5 * 300 for count in hits[2:]), hits


def test_samples_unused_for_a_day_are_dropped_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = ([name(n) for n in range(first, first + 200)] for first in (0, 1000))
    cache = SampleCache(str(tmp_path), 200 * 3 * 4096)
    for names in (old, new):
        read_through(cache, names)
    assert 70 < sum(map(cache.has, old)) < 130  # if both are in use, each keeps about half
    day_ago = time.time() - 25 * 3600
    for key in old:
        if cache.has(key):
            os.utime(cache._path(key), (day_ago, day_ago))
    later = time.time() + 2 * 3600
    monkeypatch.setattr("shards.stream.sample_cache.time.time", lambda: later)
    read_through(cache, new)
    assert read_through(cache, new) >= 190
    assert taken(tmp_path) <= cache.limit


def test_a_lock_that_others_hold_delays_no_one(
    tmp_path: Path, cache: SampleCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.stream.sample_cache.LOCK_TIMEOUT_S", 0.01)
    cache.put(name(0), b"x" * 100)
    with open(tmp_path / "samples" / "state", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        cache.put(name(1), b"y" * 100)  # not stored, but it returns
        assert cache.get(name(0)) == b"x" * 100
        assert cache.get(name(1)) is None
    cache.put(name(1), b"y" * 100)
    assert cache.get(name(1)) == b"y" * 100


def write_until_killed(cache: SampleCache, seed: int, answer: Any) -> None:
    numbers = random.Random(seed)
    for count in itertools.count():
        key = numbers.randbytes(16).hex()
        cache.put(key, key.encode() * numbers.randrange(1, 2000))
        if count % 25 == 0:
            answer.send(count)


def test_killed_writers_leave_intact_samples_within_the_limit(tmp_path: Path) -> None:
    limit, largest = 2 * 2**20, 64_000
    fork = multiprocessing.get_context("fork")
    writers: list[tuple[Any, Any]] = []
    for seed in range(12):
        receiver, sender = fork.Pipe(duplex=False)
        cache = SampleCache(str(tmp_path), limit)  # a new run, which starts with whatever it finds
        writers.append((fork.Process(target=write_until_killed, args=(cache, seed, sender)), receiver))
        writers[-1][0].start()
        for _ in range(3):
            receiver.recv()
        # Three write at any time, and the oldest is killed while it does.
        if len(writers) > 2:
            writers[-3][0].kill()
            writers[-3][0].join()
        with open(tmp_path / "samples" / "state", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # keeps them from writing and removing
            found = [*files(tmp_path), *tmp_path.glob("samples/incoming")]
            assert sum(path.stat().st_size for path in found) <= limit + largest
    for writer, _ in writers[-2:]:
        writer.kill()
        writer.join()
    assert 0.8 * limit < taken(tmp_path) <= limit
    for path in files(tmp_path):
        data = path.read_bytes()
        assert data == path.name.encode() * (len(data) // 32)
    # The next run may have a lower limit.
    cache = SampleCache(str(tmp_path), limit // 2)
    assert taken(tmp_path) <= limit // 2
    assert all(cache.get(path.name) is not None for path in files(tmp_path))


def test_faults_of_storage_and_a_small_cache_change_nothing(
    local: Dataset, remote: Dataset, tmp_path: Path, proxied: Proxied
) -> None:
    limit = SAMPLES * 4096 // 2
    faults = [Fault("corrupt", "GET", every=10), Fault("truncate", "GET", every=10), Fault("slow_down", every=20)]
    with proxied(*faults):
        got, batches = epochs(remote, SampleCache(str(tmp_path), limit), 3, workers=2)
    assert got == epochs(local, None, 3)[0]
    assert batches.statistics.cache_hits > SAMPLES // 2
    assert batches.statistics.retries > 0
    assert taken(tmp_path) <= limit
