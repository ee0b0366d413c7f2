"""fp16 and its gradient scaler. accelerate offers both on GPUs only; torch has them on the CPU as well."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from shards.storage.location import Location
from tests.trainer import tiny
from trainer.commands import train as train_script
from trainer.model.checkpoint import load
from trainer.model.losses import Trainable
from trainer.run import run_state as training

SETTINGS: dict[str, Any] = {"train__steps_per_epoch": 6, "train__checkpoint_steps": 6, "data__val_split": ""}


@pytest.fixture
def scalers(monkeypatch: pytest.MonkeyPatch) -> list[torch.amp.GradScaler]:
    """Training is in fp16 on the CPU; the scalers of the runs so far. They double their factor every other step."""
    made: list[torch.amp.GradScaler] = []

    def start(*_: object, **__: object) -> Accelerator:
        accelerator = Accelerator(cpu=True)
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")  # of all accelerators of this process
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        made.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(training, "start_accelerator", start)
    return made


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to this process in that step, once."""
    step_of = train_script.train_step

    def stepping(t: Any, *arguments: Any) -> Any:
        if t.step + 1 == step:
            monkeypatch.setattr(train_script, "train_step", step_of)
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(t, *arguments)

    monkeypatch.setattr(train_script, "train_step", stepping)


def test_an_fp16_run_goes_on_with_its_scale(
    dataset: Path, tmp_path: Path, scalers: list[torch.amp.GradScaler], monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert train_script.main(tiny.arguments(dataset, unbroken, **SETTINGS)) == 0
    stop_at(3, monkeypatch)  # the scale has grown at step 2, and would at step 4
    assert train_script.main(tiny.arguments(dataset, broken, **SETTINGS)) == 128 + signal.SIGTERM
    saved = load(Location(str(broken)) / "checkpoints/step-000003").scaler
    assert saved == scalers[1].state_dict()
    assert (saved["scale"], saved["_growth_tracker"]) == (2.0**9, 1)
    assert train_script.main(tiny.arguments(dataset, broken, **SETTINGS)) == 0
    assert scalers[2].state_dict() == scalers[0].state_dict()
    one, other = (tiny.rows(run / "metrics.jsonl") for run in (unbroken, broken))
    for key in ("losses", "grad_norm"):
        assert [row[key] for row in one] == [row[key] for row in other]
    states = [load(Location(str(run)) / "checkpoints/step-000006") for run in (unbroken, broken)]
    assert states[0].scaler == states[1].scaler
    assert all(torch.equal(value, states[1].weights[name]) for name, value in states[0].weights.items())


def test_an_fp16_run_may_skip_a_step(
    dataset: Path, tmp_path: Path, scalers: list[torch.amp.GradScaler], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Trainable.forward, []

    def failing(self: Trainable, batch: Any) -> Any:
        calls.append(batch)
        found = forward(self, batch)
        return found | ({"loss_mask": found["loss_mask"] * torch.nan} if len(calls) == 3 else {})

    monkeypatch.setattr(Trainable, "forward", failing)
    assert train_script.main(tiny.arguments(dataset, tmp_path, **SETTINGS, train__skip_nonfinite=1)) == 0
    assert ["skipped" in row for row in tiny.rows(tmp_path / "metrics.jsonl")] == [False] * 2 + [True] + [False] * 3
    assert scalers[0].state_dict()["scale"] == 2.0**9  # doubled after step 2, halved by step 3, doubled after step 5


def test_fp16_without_a_gpu_is_one_line(dataset: Path, tmp_path: Path) -> None:
    options = tiny.arguments(dataset, tmp_path / "run", train__precision="fp16")
    done = tiny.run(tiny.ROOT / "trainer" / "train.py", options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "train: error: train.precision is fp16, which needs a GPU, and this process has none: use fp32 or bf16"
    )
    assert not (tmp_path / "run").exists()
