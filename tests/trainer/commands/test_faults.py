"""How a training ends when its data, losses or gradients fail, and which steps it skips."""

import logging
import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.s3server import S3Server
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.support import REPOSITORY, damage
from tests.trainer import tiny
from trainer.commands import train
from trainer.model.checkpoint import load, open_checkpoint
from trainer.step.trainable import Trainable

SKIP: dict[str, Any] = {"data__val_split": "", "train__skip_nonfinite": 1, "train__steps_per_epoch": 3}


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
    victims = []

    def kill() -> None:
        [victim] = multiprocessing.active_children()
        victims.append(victim.pid)
        victim.kill()
        victim.join()

    tiny.before_step(monkeypatch, 2, kill)
    settings = {"train__steps_per_epoch": 50, "data__workers": 1, "data__val_split": ""}
    assert train.main(tiny.arguments(dataset, tmp_path / "run", **settings)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: error")]
    assert line.startswith(f"train: error: loader process (pid {victims[0]}) was killed by signal: Killed")


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


def test_damaged_samples_are_replaced_up_to_a_limit_and_after_a_resume(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("shards.common.back_off.SCALE", 0)
    root = tiny.write_dataset(tmp_path / "data", samples=12)
    damage(root, {2: "bytes", 3: "image", 9: "json"})
    settings = {"train__steps_per_epoch": 6, "data__val_split": "", "data__skip_bad": 3}  # an epoch of the data
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert train.main(tiny.arguments(root, whole, **settings)) == 0
    replaced = [bad for row in tiny.rows(whole / "metrics.jsonl") for bad in row.get("replaced", ())]
    assert {bad["image_id"] for bad in replaced} == {"img0002", "img0003", "img0009"}
    assert caplog.text.count("a sample is replaced (") == 3
    assert "a sample is replaced (3 of 3): " in caplog.text
    assert "3 damaged samples replaced by neighbours: img00" in caplog.text

    tiny.before_step(monkeypatch, 2, tiny.send_sigterm)
    assert train.main(tiny.arguments(root, parts, **settings)) == 128 + 15
    assert train.main(tiny.arguments(root, parts, **settings, data__workers=2)) == 0
    one, other = (tiny.rows(run / "metrics.jsonl") for run in (whole, parts))
    for key in ("losses", "replaced"):
        assert [row.get(key) for row in one] == [row.get(key) for row in other]

    # The limit is the run's, not the process's: neither meets all three.
    assert [len(row.get("replaced", ())) for row in one] == [1, 1, 0, 1, 0, 0]
    fewer = settings | {"data__skip_bad": 2}
    tiny.before_step(monkeypatch, 2, tiny.send_sigterm)
    assert train.main(tiny.arguments(root, tmp_path / "fewer", **fewer)) == 128 + 15
    capsys.readouterr()
    assert train.main(tiny.arguments(root, tmp_path / "fewer", **fewer)) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: error")]
    assert f"{root}/train/000000.tar: " in error
    assert "one more than skip_bad allows; replaced were img00" in error
    assert error.endswith("build these shards again, or raise skip_bad")


def test_a_nonfinite_loss_ends_the_run_with_its_name_and_samples(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny.arguments(dataset, tmp_path / "run", optim__lr=1e18, optim__warmup_steps=0, optim__clip_norm=0)
    assert train.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train: error: step ")
    assert "nan" in error or "inf" in error
    assert "(samples img0" in error


def test_a_bad_step_is_skipped_up_to_a_limit(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    passes = tiny.spoil_losses(monkeypatch, 2, 4)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        assert train.main(tiny.arguments(dataset, tmp_path, **SKIP)) == 0
    image_ids = ", ".join(passes[1])
    assert f"step 2 is skipped (1 of 1): loss_mask is nan on rank 0 (samples {image_ids})" in caplog.text
    rows = tiny.rows(tmp_path / "metrics.jsonl")
    assert ["skipped" in row for row in rows] == [row["loss"] is None for row in rows] == [False, True, False]
    # The limit is the run's, not the process's.
    assert train.main(tiny.arguments(dataset, tmp_path, **SKIP, train__epochs=2)) == 2
    assert "step 4: loss_mask is nan on rank 0" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in open_checkpoint(str(tmp_path)).weights.values())


def test_a_skipped_step_changes_nothing(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflow inside the backbone changes the statistics of batch norms before any loss shows it."""
    forward, calls = Trainable.forward, []

    def overflowing(self: Trainable, batch: Any, **options: Any) -> Any:
        calls.append(batch.image_ids)
        factor = torch.inf if len(calls) == 2 else 1.0
        handle = self.network.backbone.body["0"].register_forward_hook(lambda module, given, made: made * factor)
        try:
            return forward(self, batch, **options)
        finally:
            handle.remove()

    monkeypatch.setattr(Trainable, "forward", overflowing)
    settings = SKIP | {"train__ema": 0.9, "train__checkpoint_steps": 1, "train__keep_checkpoints": 9}
    assert train.main(tiny.arguments(dataset, tmp_path, **settings)) == 0
    assert ["skipped" in row for row in tiny.rows(tmp_path / "metrics.jsonl")] == [False, True, False]
    states = [load(Location(str(tmp_path)) / f"checkpoints/step-00000{step}") for step in (1, 2, 3)]
    for before, after, later in zip(*((state.weights, state.raw or {}) for state in states), strict=True):
        assert len(before) > 100
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert all(value.isfinite().all() for value in later.values())
        assert not torch.equal(after["backbone.body.0.1.running_mean"], later["backbone.body.0.1.running_mean"])
