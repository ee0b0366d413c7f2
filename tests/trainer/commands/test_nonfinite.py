"""Losses and gradients that are not finite: the run ends, or skips the step."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.storage.location import Location
from tests.trainer import tiny
from trainer.commands import train
from trainer.model.checkpoint import load, open_checkpoint
from trainer.model.losses import Trainable

SKIP: dict[str, Any] = {"data__val_split": "", "train__skip_nonfinite": 1, "train__steps_per_epoch": 3}

pytestmark = pytest.mark.usefixtures("no_curves")


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
    forward, calls = Trainable.forward, []

    def failing(self: Trainable, batch: Any) -> Any:
        found = forward(self, batch)
        calls.append(batch.image_ids)
        return found | ({"loss_mask": found["loss_mask"] * torch.nan} if len(calls) in (2, 4) else {})

    monkeypatch.setattr(Trainable, "forward", failing)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        assert train.main(tiny.arguments(dataset, tmp_path, **SKIP)) == 0
    image_ids = ", ".join(calls[1])
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

    def overflowing(self: Trainable, batch: Any) -> Any:
        calls.append(batch.image_ids)
        factor = torch.inf if len(calls) == 2 else 1.0
        handle = self.network.backbone.body.conv1.register_forward_hook(lambda module, given, made: made * factor)
        try:
            return forward(self, batch)
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
        assert not torch.equal(after["backbone.body.bn1.running_mean"], later["backbone.body.bn1.running_mean"])
