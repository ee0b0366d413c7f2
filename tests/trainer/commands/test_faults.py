"""What happens to a run when its data fail: in real processes, through `accelerate launch`."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from demo.s3server import S3Server
from shards.format.dataset import open_dataset
from tests.trainer import tiny
from trainer.commands import train as train_script

SCRIPT = tiny.ROOT / "trainer" / "train.py"


def test_a_second_epoch_comes_from_the_cache_and_the_log_says_so(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    s3.upload(tiny.write_dataset(tmp_path / "data", samples=8), bucket)
    settings = {"train__steps_per_epoch": 4, "data__cache_dir": tmp_path / "cache", "data__val_split": ""}
    rows = []
    for run in (tmp_path / "first", tmp_path / "second"):
        assert train_script.main(tiny.arguments(f"s3://{bucket}", run, **settings)) == 0
        rows.append(tiny.rows(run / "metrics.jsonl"))
    first, second = rows
    assert sum(row["samples"] for row in first) == sum(row["samples"] for row in second) == 8
    assert sum(row["requests"] for row in first) > 0
    assert sum(row["read_mb"] for row in first) > 0
    assert sum(row["cache_hits"] for row in first) == 0
    assert sum(row["cache_hits"] for row in second) == 8
    assert sum(row["requests"] for row in second) == 0
    assert [row["losses"] for row in first] == [row["losses"] for row in second]


def wait_for_step(step: int, run: Path, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def kill_a_loader_process(launcher: int, rank: int) -> int:
    """SIGKILL, as the kernel does when memory runs out; the loader processes are the children of the ranks."""
    for process in psutil.Process(launcher).children():
        if process.environ().get("RANK") == str(rank):
            (victim,) = (child for child in process.children() if "train.py" in " ".join(child.cmdline()))
            victim.send_signal(signal.SIGKILL)
            return victim.pid
    raise AssertionError(f"there is no rank {rank}")


def ended(process: subprocess.Popen[str], timeout: float) -> list[str]:
    """What the ranks and the launcher said, when all are gone; no rank with a traceback."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    _, stderr = process.communicate(timeout=timeout)
    assert process.returncode != 0
    assert psutil.wait_procs(family[1:], timeout=10)[1] == []
    assert "[rank" not in stderr
    assert stderr.count("Traceback") == 1  # the launcher's own
    return stderr.splitlines()


@pytest.mark.slow
def test_a_loader_process_that_is_killed_ends_all_ranks_with_one_line(dataset: Path, tmp_path: Path) -> None:
    """The other rank waits in a collective at that moment, and would do so for half an hour."""
    run = tmp_path / "run"
    options = tiny.arguments(dataset, run, train__steps_per_epoch=5000, data__workers=1, train__checkpoint_steps=5000)
    process = tiny.start(SCRIPT, options, ranks=2)
    wait_for_step(2, run, process)
    victim = kill_a_loader_process(process.pid, rank=1)
    lines = ended(process, timeout=60)
    (told,) = [line for line in lines if line.startswith("train: error")]
    assert re.match(
        rf"train: error on rank 1: (DataLoader worker|loader process) \(pid {victim}\) (is killed|ended)", told
    )
    assert "train: rank 0 ends: it lost the connection to another rank, whose own message says why" in lines
    assert f"  traceback : {told}" in lines  # the end of the launcher's own report


@pytest.mark.slow
def test_a_sample_that_only_one_rank_cannot_read_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    root, run = tiny.write_dataset(tmp_path / "data"), tmp_path / "run"
    index = open_dataset(str(root)).index("train")
    shard, offset = root / index.shard_paths[0], int(index.offset[3])
    data = bytearray(shard.read_bytes())
    data[offset + 1000] ^= 1
    shard.write_bytes(data)
    process = tiny.start(SCRIPT, tiny.arguments(root, run, train__steps_per_epoch=5000, data__workers=1), ranks=2)
    lines = ended(process, timeout=120)
    (told,) = [line for line in lines if line.startswith("train: error")]
    assert f"{shard}: sample {index.image_id(3)} at offset {offset}: crc32 is " in told
    assert f"  traceback : {told}" in lines
