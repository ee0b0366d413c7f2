import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from unittest.mock import Mock

import pytest
import torch

from demo.s3proxy import Fault
from shards.common.errors import LoaderError, SampleError
from shards.format.dataset import Dataset
from shards.format.sample import Sample
from shards.stream import batch_transport
from shards.stream.loader import Loader, LoaderStatistics, loader
from shards.stream.streams import EvalStream, ShardStream
from shards.stream.torch_internals import dead_worker, receive
from tests.shards.stream.support import BATCH, EPOCH, SAMPLES, small_stream, take
from tests.support import Proxied, sample, write_dataset


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def kill(process: int) -> None:
    """Kill a process and wait until it is dead, without reaping it, which is up to its parent's `multiprocessing`."""
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("workers", [0, 2])
def test_statistics_are_those_of_all_loader_processes(remote: Dataset, proxied: Proxied, workers: int) -> None:
    nbytes = int(remote.index("train").nbytes.sum())
    with proxied(Fault("truncate", "GET", times=1)) as proxy:
        batches: Loader = loader(EvalStream(remote, "train", batch_size=BATCH), workers=workers)
        assert batches.statistics == LoaderStatistics()
        for number, _ in enumerate(batches, start=1):
            assert batches.statistics.samples == BATCH * number
        once = batches.statistics
        assert (once.samples, once.cache_hits) == (SAMPLES, 0)
        assert once.requests == proxy.counters.requests["GET"]
        assert once.retries == proxy.counters.faults["truncate"] == 6
        if not workers:  # a process that was forked from one that has read so reads again from the start
            assert nbytes <= once.nbytes == proxy.counters.sent < 1.1 * nbytes  # continued where the answer broke
        assert 0 < once.waited_s < once.seconds
        shares = (once.waited_s, once.nbytes / 1e6, SAMPLES)
        assert (once.wait_share, once.mb_per_s, once.samples_per_s) == pytest.approx([n / once.seconds for n in shares])
        # A second loop adds to the first.
        assert len(list(batches)) == len(batches) == EPOCH
        second = batches.statistics.since(once)
        assert (second.samples, second.retries) == (SAMPLES, 0)
        assert batches.statistics.requests == proxy.counters.requests["GET"]
    assert pickle.loads(pickle.dumps(once)) == once  # noqa: S301 (our own bytes, made here)


def test_a_killed_loader_process_is_one_line_in_the_loop(local: Dataset) -> None:
    """As the kernel kills it when memory runs out. What the loop does with a batch is not interrupted."""
    before = children()
    batches = iter(loader(small_stream(local), workers=2))
    next(batches)
    victim = min(children() - before)
    kill(victim)
    with pytest.raises(LoaderError) as caught:
        list(islice(batches, 10_000))
    assert children() <= before  # though the error is kept, and with it the loop
    assert re.fullmatch(
        rf"loader process \(pid {victim}\) (was killed by signal: Killed|ended while it sent a batch)"
        r": usually the kernel kills it because memory runs out \(see dmesg\): use fewer workers"
        r" \(workers=, or --data\.workers of a command\) or less read-ahead \(read_ahead=, or [^\n]*",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1, "ended with exit status 1: its own error is printed above; if the start method is spawn .*__main__"),
        (-11, "was killed by signal: Segmentation fault: the kernel's answer to a crash in a library"),
        (-9, "was killed by signal: Killed: usually the kernel kills it because memory runs out"),
    ],
)
def test_only_a_kill_is_blamed_on_memory(code: int, reason: str) -> None:
    error = dead_worker(SimpleNamespace(_workers=[SimpleNamespace(exitcode=code, pid=5)]))  # type: ignore[arg-type]
    assert re.match(rf"loader process \(pid 5\) {reason}", str(error))
    assert ("memory" in str(error)) == (code == -9)


def test_a_process_that_ends_with_status_0_is_an_error_with_the_remedy() -> None:
    def ended() -> Iterator[Any]:
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
        yield

    with pytest.raises(LoaderError, match=r"exited unexpectedly: usually .* use fewer workers"):
        receive(ended())


def test_a_batch_of_a_dead_process_is_received_as_the_error() -> None:
    """An exception would end the thread in which torch receives batches if memory is pinned."""
    receiver, answer = multiprocessing.Pipe(duplex=False)

    def send() -> None:
        batch_transport.begin()
        answer.send_bytes(ForkingPickler.dumps(batch_transport.pack([torch.ones(3)])))
        signal.pause()

    sender = multiprocessing.get_context("fork").Process(target=send)
    sender.start()
    data = receiver.recv_bytes()
    sender.kill()
    sender.join()
    batch = pickle.loads(data)  # noqa: S301 (our own bytes, made here)
    assert isinstance(batch, LoaderError)
    assert str(batch).startswith(f"loader process (pid {sender.pid}) ended while it sent a batch: ")


class _Pinned:
    """A batch that is put into page-locked memory without a GPU."""

    def __init__(self, samples: list[Sample], epoch: int) -> None:
        self.samples, self.pinned = samples, False

    def pin_memory(self) -> Self:
        self.pinned = True
        return self


def test_a_killed_loader_process_is_one_line_if_memory_is_pinned(
    local: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"is_available": True, "current_accelerator": torch.device("cuda"), "current_device_index": 0}
    for name, answer in (answers | {"set_device_index": None}).items():
        monkeypatch.setattr(f"torch.accelerator.{name}", Mock(return_value=answer))
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    before = children()
    pinning = ShardStream(local, "train", batch_size=BATCH, collate=_Pinned)
    batches = iter(loader(pinning, workers=1, pin_memory=True))
    assert next(batches).pinned
    (victim,) = children() - before
    kill(victim)
    with pytest.raises(LoaderError, match=rf"pid {victim}\)"):
        list(islice(batches, 10_000))
    assert children() <= before
    assert died == []


@pytest.mark.parametrize("workers", [0, 2])
def test_other_errors_are_unchanged_and_end_the_loader_processes(
    local: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def collate(samples: list[Sample], epoch: int) -> None:
        raise RuntimeError("a bug in collate")

    before = children()
    with pytest.raises(RuntimeError, match="a bug in collate") as kept:
        take(ShardStream(local, "train", batch_size=BATCH, collate=collate), 1, workers)
    assert children() <= before  # though the error is kept, and with it the loop
    assert kept.value.__traceback__ is not None
    monkeypatch.setattr("shards.common.back_off.SCALE", 0)
    broken = write_dataset(tmp_path, {"train": [sample(n) for n in range(SAMPLES)]})
    (tmp_path / "train" / "000002.tar").unlink()
    with pytest.raises(SampleError, match=r"^[^\n]*train/000002.tar: sample \w+ at offset \d+: cannot be read[^\n]*$"):
        take(small_stream(broken), 2 * EPOCH, workers)
    assert children() <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stall_is_logged_by_the_waiting_process_and_so_is_its_end(
    local: Dataset, remote: Dataset, proxied: Proxied, tmp_path: Path, workers: int
) -> None:
    # A file, because loader processes share nothing else with a test.
    handler, logger = logging.FileHandler(tmp_path / "log"), logging.getLogger("shards")
    logger.addHandler(handler)

    def heal(_: object) -> None:
        if "the last because of" in (tmp_path / "log").read_text():
            proxy.faults = ()

    try:
        stall = Fault("stall", "GET", "000003", after=0.25)
        # Repeated until the log has shown it.
        with proxied(stall, timeout_s=0.5, attempts=10**6, on_request=heal) as proxy:
            got = take(small_stream(remote, stall_s=0.2, rank=1, world=2), EPOCH, workers)
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert got == take(small_stream(local, rank=1, world=2), EPOCH)
    lines = (tmp_path / "log").read_text().splitlines()
    who = "rank 1, loader worker [01]" if workers else "rank 1"
    waited = re.compile(
        rf"{who} has waited (?P<s>\d+) s for bytes \d+ to \d+ of {remote.root}/train/00000(?P<shard>\d).tar: "
        r"(?P<received>\d+) received, (?P<retries>\d+) (retry|retries)(, the last because of: (?P<why>.*))?"
    )
    waits = [found for line in lines if (found := waited.fullmatch(line))]
    again = [line for line in lines if re.fullmatch(rf"{who} has data again, after \d+ s", line)]
    assert again
    assert len([line for line in lines if "was forked from one" not in line]) == len(again) + len(waits)
    stalled = [found for found in waits if found["shard"] == "3"]  # a busy machine may log other ranges, too
    if not workers:
        assert any(int(found["received"]) > 0 for found in stalled)
    why = "the answer took too long|Read timeout|no answer came"
    assert any(int(found["retries"]) > 0 and re.match(why, found["why"] or "") for found in stalled)


def test_a_loader_process_prints_no_traceback_if_its_reader_is_gone() -> None:
    """Such as a rank that is killed while it receives a batch; other errors of that thread are printed."""
    code = """
import sys
from shards.stream.torch_internals import ignore_lost_readers

ignore_lost_readers()
for error in (ConnectionResetError("reader"), BrokenPipeError("reader"), EOFError("reader"), ValueError("bug")):
    sys.excepthook(type(error), error, None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "ValueError: bug\n"
