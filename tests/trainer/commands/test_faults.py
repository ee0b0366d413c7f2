"""How a training ends when its data fail: on one rank in this process, on two under `accelerate launch`."""

import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest

from demo.s3server import S3Server
from shards.format.dataset import open_dataset
from tests.support import REPOSITORY
from tests.trainer import tiny
from trainer.commands import train

pytestmark = pytest.mark.usefixtures("no_curves")


def test_a_second_run_reads_from_the_cache_and_logs_it(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    s3.upload(tiny.write_dataset(tmp_path / "data", samples=8), bucket)
    settings = {"train__steps_per_epoch": 4, "data__cache_dir": tmp_path / "cache", "data__val_split": ""}
    for run in ("first", "second"):
        assert train.main(tiny.arguments(f"s3://{bucket}", tmp_path / run, **settings)) == 0
    first, second = (tiny.rows(tmp_path / run / "metrics.jsonl") for run in ("first", "second"))
    assert sum(row["samples"] for row in first) == sum(row["samples"] for row in second) == 8
    assert min(sum(row[key] for row in first) for key in ("requests", "read_mb")) > 0
    assert [sum(row["cache_hits"] for row in rows) for rows in (first, second)] == [0, 8]
    assert sum(row["requests"] for row in second) == 0
    assert [row["losses"] for row in first] == [row["losses"] for row in second]


def test_a_killed_loader_process_is_one_line(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL, as the kernel sends when memory runs out."""
    train_step, victims = train.train_step, []

    def stepping(t: Any, *rest: Any) -> Any:
        if t.step == 1:
            (victim,) = multiprocessing.active_children()
            victims.append(victim.pid)
            victim.kill()
            victim.join()
        return train_step(t, *rest)

    monkeypatch.setattr(train, "train_step", stepping)
    settings = {"train__steps_per_epoch": 50, "data__workers": 1, "data__val_split": ""}
    assert train.main(tiny.arguments(dataset, tmp_path / "run", **settings)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: error")]
    assert line.startswith(f"train: error: loader process (pid {victims[0]}) was killed by signal: Killed")


@pytest.mark.slow
def test_a_sample_that_one_rank_cannot_read_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    """The other rank waits in a collective operation at that moment, and would do so for hours."""
    root = tiny.write_dataset(tmp_path / "data")
    index = open_dataset(str(root)).index("train")
    shard, offset = root / index.shard_paths[0], int(index.offset[3])
    data = bytearray(shard.read_bytes())
    data[offset + 1000] ^= 1
    shard.write_bytes(data)
    # `run` returns when no process has stderr open any more.
    options = tiny.arguments(root, tmp_path / "run", train__steps_per_epoch=50, data__workers=1)
    done = tiny.run(REPOSITORY / "trainer" / "train.py", options, ranks=2)
    assert done.returncode != 0
    assert "[rank" not in done.stderr
    assert done.stderr.count("Traceback") == 1  # the launcher's own
    lines = done.stderr.splitlines()
    (line,) = [line for line in lines if line.startswith("train: error")]
    assert f"  traceback : {line}" in lines  # the end of the launcher's own report
    assert f"{shard}: sample {index.image_id(3)} at offset {offset}: crc32 is " in line
    (rank,) = re.findall(r"^train: error(?: on rank (\d))?:", line)
    assert (
        f"train: rank {1 - int(rank or 0)} ends: it lost the connection to another rank, whose own message says why"
        in lines
    )
