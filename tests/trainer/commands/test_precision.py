"""Precisions of training. fp16 and its gradient scaler: accelerate offers them on GPUs only, torch also on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from shards.storage.location import Location
from tests.trainer import tiny
from trainer.commands import train
from trainer.model.checkpoint import load, open_checkpoint
from trainer.run import run_state

QUICK: dict[str, Any] = {"train__steps_per_epoch": 2, "data__val_split": ""}


@pytest.fixture
def scalers(monkeypatch: pytest.MonkeyPatch) -> list[torch.amp.GradScaler]:
    """Train in fp16 on the CPU; returns the scalers of the runs so far, which double their scale every other step."""
    made: list[torch.amp.GradScaler] = []

    def start(*_: object, **__: object) -> Accelerator:
        accelerator = Accelerator(cpu=True)
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")  # of all accelerators of this process
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        made.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(run_state, "start_accelerator", start)
    return made


def test_an_fp16_run_resumes_with_its_scale(
    dataset: Path, tmp_path: Path, scalers: list[torch.amp.GradScaler], monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert train.main(tiny.arguments(dataset, unbroken, **QUICK)) == 0
    tiny.before_step(monkeypatch, 1, tiny.send_sigterm)  # the scale grows at step 2, because step 1 counts
    assert train.main(tiny.arguments(dataset, broken, **QUICK)) == 128 + 15
    saved = load(Location(str(broken)) / "checkpoints/step-000001").scaler
    assert saved == scalers[1].state_dict()
    assert (saved["scale"], saved["_growth_tracker"]) == (2.0**8, 1)
    assert train.main(tiny.arguments(dataset, broken, **QUICK)) == 0
    assert scalers[0].state_dict()["scale"] == 2.0**9
    assert scalers[2].state_dict() == scalers[0].state_dict()
    one, other = (tiny.rows(run / "metrics.jsonl") for run in (unbroken, broken))
    for key in ("losses", "grad_norm"):
        assert [row[key] for row in one] == [row[key] for row in other]
    states = [load(Location(str(run)) / "checkpoints/step-000002") for run in (unbroken, broken)]
    assert states[0].scaler == states[1].scaler
    assert all(torch.equal(value, states[1].weights[name]) for name, value in states[0].weights.items())


def test_an_fp16_run_may_skip_a_step(
    dataset: Path, tmp_path: Path, scalers: list[torch.amp.GradScaler], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.spoil_losses(monkeypatch, 1)
    assert train.main(tiny.arguments(dataset, tmp_path, **QUICK, train__skip_nonfinite=1)) == 0
    assert ["skipped" in row for row in tiny.rows(tmp_path / "metrics.jsonl")] == [True, False]
    assert scalers[0].state_dict()["scale"] == 2.0**7  # halved by step 1


def test_bf16_and_channels_last_learn_about_the_same(
    dataset: Path, tmp_path: Path, fresh_accelerator: Callable[[], None]
) -> None:
    losses = []
    for name, changes in (("fp32", {}), ("bf16", {"train__precision": "bf16", "train__channels_last": "true"})):
        fresh_accelerator()
        assert train.main(tiny.arguments(dataset, tmp_path / name, **QUICK, **changes)) == 0
        losses.append([row["loss"] for row in tiny.rows(tmp_path / name / "metrics.jsonl")])
    environment = json.loads((tmp_path / "bf16/environment.json").read_text())
    assert (environment["mixed_precision"], environment["world_size"], environment["device"][:3]) == ("bf16", 1, "cpu")
    assert environment["packages"]["torch"]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert all(value.is_contiguous() for value in open_checkpoint(str(tmp_path / "bf16")).weights.values())
