"""Loader processes: what they tell of themselves, how they die, and that they end."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import psutil
import pytest
import torch

from demo.s3proxy import Fault, S3Proxy
from demo.s3server import S3Server
from shards.common.errors import LoaderError, SampleError
from shards.format.dataset import Dataset, open_dataset
from shards.format.sample import Sample
from shards.stream import batch_transport as handover
from shards.stream.loader import Loader, LoaderStatistics, _Item, loader
from shards.stream.reader import SampleStatistics
from shards.stream.streams import EvalStream, ShardStream
from tests.support import sample, write_dataset

SAMPLES, BATCH = 60, 4


@pytest.fixture(scope="module")
def root(s3: S3Server) -> Iterator[str]:
    """A dataset of 60 samples in 6 shards on S3."""
    s3.make_bucket("loader-tests")
    write_dataset("s3://loader-tests/data", {"train": [sample(n) for n in range(SAMPLES)]}, per_shard=10)
    yield "s3://loader-tests/data"
    s3.filesystem().rm("loader-tests", recursive=True)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    samples = {"train": [sample(n) for n in range(SAMPLES)]}
    return write_dataset(tmp_path_factory.mktemp("data"), samples, per_shard=10)


def stream(dataset: Dataset, **options: float) -> ShardStream[list[Sample]]:
    settings = {"seed": 3, "lanes": 3, "window": 8, "read_ahead": 30_000}
    return ShardStream(dataset, "train", batch_size=BATCH, **(settings | options))


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_statistics_are_those_of_all_loader_processes(s3: S3Server, root: str, through: Callable, workers: int) -> None:
    dataset = open_dataset(root)
    nbytes = int(dataset.index("train").nbytes.sum())
    with S3Proxy(s3.endpoint_url, [Fault("truncate", "GET", times=1)]) as proxy:
        through(proxy, patience=60)  # on a busy machine too, a request is repeated for its fault alone
        batches: Loader = loader(EvalStream(dataset, "train", batch_size=BATCH), workers=workers)
        assert batches.statistics == LoaderStatistics()
        began = time.perf_counter()
        for number, _ in enumerate(batches, start=1):
            assert batches.statistics.samples == BATCH * number
            time.sleep(0.002)  # the loop's own work
        seconds = time.perf_counter() - began
        once = batches.statistics
        assert (once.samples, once.cache_hits) == (SAMPLES, 0)
        assert once.requests == proxy.counters.requests["GET"]
        assert once.retries == proxy.counters.faults["truncate"] == 6
        assert once.nbytes == proxy.counters.sent >= nbytes
        assert 0 < once.waited_s < once.seconds <= seconds
        assert once.wait_share == pytest.approx(once.waited_s / once.seconds)
        assert once.mb_per_s == pytest.approx(once.nbytes / 1e6 / once.seconds)
        assert once.samples_per_s == pytest.approx(SAMPLES / once.seconds)
        # A second loop adds to the first.
        assert len(list(batches)) == SAMPLES // BATCH
        second = batches.statistics.since(once)
        assert (second.samples, second.retries) == (SAMPLES, 0)
        assert batches.statistics.requests == proxy.counters.requests["GET"]
    assert pickle.loads(pickle.dumps(once)) == once  # noqa: S301 (our own bytes, made here)


@pytest.mark.parametrize("moment", ["waiting", "working"])
def test_a_loader_process_that_is_killed_is_one_line(local: Dataset, moment: str) -> None:
    """As the kernel does it when memory runs out; also while the loop does something else, which is left in peace."""
    before = children()
    batches = iter(loader(stream(local), workers=2))
    next(batches)
    victim = min(children() - before)
    began = time.monotonic()
    worked = False
    with pytest.raises(LoaderError) as caught:  # noqa: PT012
        os.kill(victim, signal.SIGKILL)
        if moment == "working":
            time.sleep(1)
            worked = True
        for _ in itertools.islice(batches, 10_000):
            pass
    assert time.monotonic() - began < 20
    assert worked == (moment == "working")
    batches.close()
    assert children() <= before
    assert re.fullmatch(
        rf"loader process \(pid {victim}\) (was killed by signal: Killed|ended while it sent a batch)"
        r": usually the kernel kills it because memory runs out \(see dmesg\): use fewer workers"
        r" \(workers=, or --data\.workers of a command\) or less read-ahead \(read_ahead=, or [^\n]*",
        str(caught.value),
    )


def test_a_batch_whose_sender_is_gone_is_received_as_the_error(local: Dataset) -> None:
    """Where memory is pinned, torch receives in a thread, which an exception would end with a traceback."""
    channel, spawn = multiprocessing.Pipe(duplex=False), multiprocessing.get_context("fork").Process

    def send() -> None:
        handover.begin()
        packed = handover.pack([torch.ones(3)])
        channel[1].send_bytes(ForkingPickler.dumps(_Item(packed, None, 0, SampleStatistics())))
        time.sleep(60)

    for killed in (False, True):
        sender = spawn(target=send)
        sender.start()
        data = channel[0].recv_bytes()
        if killed:
            sender.kill()
            sender.join()
        item = pickle.loads(data)  # noqa: S301 (our own bytes, made here)
        if killed:
            assert isinstance(item.batch, LoaderError)
            assert str(item.batch).startswith(f"loader process (pid {sender.pid}) ended while it sent a batch: ")
        else:
            assert item.batch[0].tolist() == [1, 1, 1]
        sender.kill()
        sender.join()


class _Pinned:
    """A batch that is put into page-locked memory without a GPU."""

    def __init__(self, samples: list[Sample], epoch: int) -> None:
        self.samples, self.pinned = samples, False

    def pin_memory(self) -> _Pinned:
        self.pinned = True
        return self


def test_a_loader_process_that_is_killed_is_one_line_where_memory_is_pinned(
    local: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
    monkeypatch.setattr("torch.accelerator.set_device_index", lambda index: None)
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    before = children()
    pinning = ShardStream(local, "train", batch_size=BATCH, collate=_Pinned)
    batches = iter(loader(pinning, workers=1, pin_memory=True))
    assert next(batches).pinned
    (victim,) = children() - before
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(LoaderError, match=rf"pid {victim}\)"):
        for _ in itertools.islice(batches, 10_000):
            pass
    batches.close()
    assert children() <= before
    assert died == []


def test_other_errors_of_the_loop_stay_what_they_are(local: Dataset) -> None:
    def collate(samples: list[Sample], epoch: int) -> None:
        raise RuntimeError("a bug of the user's")

    before = children()
    for workers in (0, 2):
        with pytest.raises(RuntimeError, match="a bug of the user's"):
            next(iter(loader(ShardStream(local, "train", batch_size=BATCH, collate=collate), workers=workers)))
        assert children() <= before  # though pytest still holds the error


def test_loader_processes_end_with_the_error_though_that_is_kept(tmp_path: Path, monkeypatch) -> None:
    """The collector would end them later, and wait 5 s for each."""
    monkeypatch.setattr("shards.common.back_off.SCALE", 0)
    broken = write_dataset(tmp_path, {"train": [sample(n) for n in range(SAMPLES)]})
    (tmp_path / "train" / "000002.tar").unlink()
    before = children()
    began = time.monotonic()
    with pytest.raises(SampleError) as kept:
        list(itertools.islice(loader(stream(broken), workers=2), 30))
    assert children() <= before
    assert time.monotonic() - began < 4
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stall_is_told_by_who_waits_and_so_is_its_end(
    s3: S3Server, root: str, through: Callable, tmp_path: Path, workers: int
) -> None:
    dataset = open_dataset(root)
    expected = list(itertools.islice(stream(dataset, rank=1, world=2), 15))
    # A file, because loader processes share nothing else with a test.
    handler, logger = logging.FileHandler(tmp_path / "log"), logging.getLogger("shards")
    logger.addHandler(handler)

    def heal(_: object) -> None:
        if "the last because of" in (tmp_path / "log").read_text():
            proxy.faults = ()

    try:
        proxy = S3Proxy(s3.endpoint_url, [Fault("stall", "GET", "000003", after=0.25)], on_request=heal)
        with proxy:
            through(proxy)
            slow = stream(dataset, stall_s=0.2, rank=1, world=2)
            got = list(itertools.islice(loader(slow, workers=workers), 15))
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert got == expected
    lines = (tmp_path / "log").read_text().splitlines()
    who = "rank 1, loader worker [01]" if workers else "rank 1"
    place = rf"bytes \d+ to \d+ of {re.escape(root)}/train/00000\d.tar"
    pattern = re.compile(rf"{who} has waited (\d+) s for {place}: (\d+) received, (\d+) (?:retry|retries)(.*)")
    told = [pattern.fullmatch(line) for line in lines]
    again = [line for line in lines if re.fullmatch(rf"{who} has data again, after \d+ s", line)]
    assert any(told)
    assert again
    assert len(lines) == len(again) + sum(match is not None for match in told)
    # A busy machine tells of other ranges, too. The times between the lines double: 0.2, 0.4, 0.8 s.
    stalled = [match for match in told if match and "000003" in match[0]]
    assert 1 <= len(stalled) <= 10
    assert any(int(match[2]) > 0 for match in stalled)
    trouble = re.compile(r", the last because of: (Timeout on reading|only \d+ bytes? came in 0.5 s)")
    assert any(int(match[3]) > 0 and trouble.match(match[4]) for match in stalled)


def test_a_reader_that_is_gone_is_no_traceback_of_a_loader_process() -> None:
    """Such as a rank that is killed while it takes a batch over; other errors of that thread are told."""
    code = """
import sys
from shards.stream.torch_internals import ignore_lost_readers

ignore_lost_readers()
for error in (ConnectionResetError("reader"), BrokenPipeError("reader"), EOFError("reader"), ValueError("bug")):
    sys.excepthook(type(error), error, None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "ValueError: bug\n"
