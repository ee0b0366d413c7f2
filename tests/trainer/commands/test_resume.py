"""Resuming a run, and what refuses to. `test_two_ranks.py` shows that a resumed run equals an uninterrupted one."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.storage.location import Location
from tests.trainer import tiny
from trainer.commands import train
from trainer.model.checkpoint import load, open_checkpoint

QUICK: dict[str, Any] = {"train__steps_per_epoch": 1, "data__val_split": ""}


def test_a_run_continues_with_more_epochs_and_new_settings_and_logs_when_it_is_finished(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(epochs: int, **changes: Any) -> None:
        arguments = tiny.arguments(dataset, tmp_path, train__epochs=epochs, train__steps_per_epoch=1, **changes)
        assert train.main(arguments) == 0

    run(1)
    run(2, optim__momentum=0.5, optim__weight_decay=0.25)
    metrics, evaluations = tmp_path / "metrics.jsonl", tmp_path / "evaluations.jsonl"
    assert [row["step"] for row in tiny.rows(metrics)] == [row["step"] for row in tiny.rows(evaluations)] == [1, 2]
    optimizer = load(Location(str(tmp_path)) / "checkpoints/step-000002").optimizer
    assert optimizer is not None
    [group] = optimizer["param_groups"]
    assert (group["momentum"], group["weight_decay"], bool(optimizer["state"])) == (0.5, 0.25, True)
    before = metrics.read_bytes()
    # An evaluation that was interrupted is repeated.
    rows = evaluations.read_text().splitlines(keepends=True)
    evaluations.write_text(rows[0] + rows[1][:20])
    with caplog.at_level(logging.INFO, logger="trainer"):
        run(2)
    assert "is finished (2 steps): raise train.epochs to continue it" in caplog.text
    assert metrics.read_bytes() == before
    assert evaluations.read_text().splitlines(keepends=True) == rows


def test_resume_continues_its_own_run_or_starts_from_a_named_checkpoint(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, epochs: int, *more: str) -> tuple[int, str]:
        settings = QUICK | {"train__epochs": epochs, "train__keep_checkpoints": 9}
        status = train.main([*tiny.arguments(dataset, tmp_path / name, **settings), *more])
        return status, (capsys.readouterr().err.splitlines() or [""])[-1]

    error = f"train: error: {tmp_path}/one: there is no checkpoint to resume: "
    status, line = run("one", 2, "--resume")
    assert status == 2
    assert line.startswith(error)
    assert run("one", 2)[0] == 0
    assert run("one", 3, "--resume")[0] == 0
    assert len(tiny.rows(tmp_path / "one/metrics.jsonl")) == 3

    # A run in another folder starts from a given checkpoint, and then resumes from its own.
    first = str(tmp_path / "one/checkpoints/step-000001")
    assert run("two", 2, "--resume", first)[0] == 0
    assert run("two", 3, "--resume", first)[0] == 0
    assert tiny.rows(tmp_path / "two/metrics.jsonl")[0]["step"] == 2
    one, two = (open_checkpoint(str(tmp_path / name)).weights for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    # It evaluates the checkpoint if an evaluation is due, before it has a step of its own to draw.
    assert run("three", 2, "--resume", first, "--data.val_split", "val")[0] == 0
    assert [row["step"] for row in tiny.rows(tmp_path / "three/evaluations.jsonl")] == [1, 2]
    assert (tmp_path / "three/curves.png").exists()

    status, line = run("one", 3, "--resume", first)
    assert status == 2
    assert f"beyond {first}" in line
    assert "to step 3: give another --run.dir" in line

    status, line = run("one", 3, "--train.stages", "[{layers: heads, epochs: 4}]")
    assert status == 2
    assert "train.layers (at step 3) 'all', now it is 'heads'" in line
