"""Stages, resume and signals: what is exact, and what is the same on all ranks."""

import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from shards.storage.location import Location
from tests.trainer import tiny
from trainer.commands import train as train_script
from trainer.model.checkpoint import State, flatten_optimizer, load, load_newest, open_checkpoint, steps_of
from trainer.model.losses import Trainable

SCRIPT = tiny.ROOT / "trainer" / "train.py"
STAGES = "[{layers: heads, epochs: 1}, {layers: all, epochs: 1, lr: 0.1}]"
EVERYTHING = {
    "train__stages": STAGES,
    "train__steps_per_epoch": 3,
    "train__accumulate": 2,
    "train__ema": 0.9,
    "train__checkpoint_steps": 2,
    "train__keep_checkpoints": 9,
    "optim__optimizer": "adamw",
    "optim__decay_norms": "false",
    "optim__schedule": "cosine",
    "optim__warmup_steps": 1,
    "data__photometric": 0.5,
}

# At the beginning of each stage and at the end, writes what this rank holds.
HASHING = """
import hashlib, os, sys
from pathlib import Path
from trainer.commands import train as script

folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")

def tell(network, step):
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if "running" not in name and "num_batches" not in name:  # the main rank's are shared when they are saved
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    (folder / f"step-{step}-rank-{rank}").write_text(digest.hexdigest())

def begin(t, begin_stage=script.begin_stage):
    tell(t.network, t.step)
    begin_stage(t)

script.begin_stage = begin
config = script.parse(sys.argv[2:])
tell(script.train(config), "end")
"""


def losses(run: Path) -> list[dict[str, float]]:
    found = tiny.rows(run / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["losses"] for row in found]


def flatten(state: State) -> dict[str, torch.Tensor]:
    assert state.raw is not None
    assert state.optimizer is not None
    parts = {"weights": state.weights, "raw": state.raw, "optimizer": flatten_optimizer(state.optimizer)[0]}
    return {f"{part} {name}": value for part, values in parts.items() for name, value in values.items()}


def send_at(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """SIGTERM to this process in each of these steps, once."""
    step_of, left = train_script.train_step, set(steps)

    def step(t: Any, *arguments: Any) -> Any:
        if t.step + 1 in left:
            left.remove(t.step + 1)
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(t, *arguments)

    monkeypatch.setattr(train_script, "train_step", step)


def test_a_run_that_signals_ended_goes_on_to_the_last_bit(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert train_script.main(tiny.arguments(dataset, unbroken, **EVERYTHING)) == 0
    before = signal.getsignal(signal.SIGTERM)
    send_at(monkeypatch, {2, 3, 5})  # in the first stage, at its end, and in the second
    for step in (2, 3, 5):
        assert train_script.main(tiny.arguments(dataset, broken, **EVERYTHING)) == 128 + signal.SIGTERM
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"train: stopped by a signal after step {step}, which is saved in {broken}")
        assert steps_of(Location(str(broken)))[-1] == step
        assert signal.getsignal(signal.SIGTERM) == before
    # Other loader processes read the same batches.
    assert train_script.main(tiny.arguments(dataset, broken, **EVERYTHING, data__workers=1)) == 0
    assert losses(broken) == losses(unbroken)
    assert tiny.rows(broken / "evaluations.jsonl") == tiny.rows(unbroken / "evaluations.jsonl")
    # Weights, their average and the optimizer.
    states = [load(Location(str(run)) / "checkpoints/step-000006") for run in (unbroken, broken)]
    one, other = (flatten(state) for state in states)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []

    rows = tiny.rows(unbroken / "metrics.jsonl")
    assert [row["position"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert [row["images"] for row in rows] == [4] * 6
    state = states[0]
    assert state.raw is not None
    assert any(not torch.equal(value, state.raw[name]) for name, value in state.weights.items())
    # The backbone stood still in the first stage and moved in the second.
    first = load(Location(str(unbroken)) / "checkpoints/step-000002").raw
    third = load(Location(str(unbroken)) / "checkpoints/step-000003").raw
    assert first is not None
    assert third is not None
    body = "backbone.body.layer4.0.conv1.weight"
    assert torch.equal(first[body], third[body])
    assert not torch.equal(third[body], state.raw[body])
    assert not torch.equal(first["rpn.head.cls_logits.weight"], third["rpn.head.cls_logits.weight"])


def test_resume_says_where_from(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick: dict[str, Any] = {"train__steps_per_epoch": 1, "data__val_split": "", "train__keep_checkpoints": 9}

    def run(name: str, epochs: int, *more: str) -> tuple[int, str]:
        status = train_script.main([*tiny.arguments(dataset, tmp_path / name, train__epochs=epochs, **quick), *more])
        return status, (capsys.readouterr().err.splitlines() or [""])[-1]

    status, told = run("one", 2, "--resume")
    assert (status, told) == (
        2,
        f"train: error: {tmp_path}/one: there is no checkpoint to resume: leave --resume out to begin",
    )
    assert run("one", 2)[0] == 0
    assert run("one", 3, "--resume")[0] == 0
    assert len(losses(tmp_path / "one")) == 3

    # A run of another folder begins at a given checkpoint, and then goes on from its own.
    first = str(tmp_path / "one/checkpoints/step-000001")
    for epochs in (2, 3):
        assert run("two", epochs, "--resume", first)[0] == 0
    assert tiny.rows(tmp_path / "two/metrics.jsonl")[0]["step"] == 2
    newest = [load_newest(Location(str(tmp_path / name))) for name in ("one", "two")]
    assert newest[0] is not None
    assert newest[1] is not None
    assert all(torch.equal(value, newest[1][1].weights[name]) for name, value in newest[0][1].weights.items())
    # It rates the weights that it begins with where an evaluation is due, before it has a step of its own to draw.
    quick["data__val_split"] = "val"
    assert run("three", 2, "--resume", first)[0] == 0
    assert [row["step"] for row in tiny.rows(tmp_path / "three/evaluations.jsonl")] == [1, 2]
    assert (tmp_path / "three/curves.png").exists()
    quick["data__val_split"] = ""

    status, told = run("one", 3, "--resume", first)
    assert status == 2
    assert told.endswith(f"has continued beyond {first} to step 3: give another --run.dir to branch off there")

    status, told = run("one", 3, "--train.stages", "[{layers: heads, epochs: 4}]")
    assert status == 2
    assert "train.layers (at step 3) 'all', now it is 'heads'" in told


def test_a_bad_step_is_skipped_up_to_a_cap(
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
    settings: dict[str, Any] = {"data__val_split": "", "train__skip_nonfinite": 1, "train__steps_per_epoch": 3}
    with caplog.at_level(logging.WARNING, logger="trainer"):
        assert train_script.main(tiny.arguments(dataset, tmp_path / "run", **settings)) == 0
    ids = ", ".join(calls[1])
    assert f"step 2 is skipped (1 of 1): loss_mask is nan on rank 0 (samples {ids})" in caplog.text
    rows = tiny.rows(tmp_path / "run/metrics.jsonl")
    assert [("skipped" in row, row["loss"] is None) for row in rows] == [
        (False,) * 2,
        (True,) * 2,
        (False,) * 2,
    ]
    # The cap is the run's, not the process's.
    assert train_script.main(tiny.arguments(dataset, tmp_path / "run", **settings, train__epochs=2)) == 2
    assert "step 4: loss_mask is nan on rank 0" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in open_checkpoint(str(tmp_path / "run")).weights.values())


def test_a_skipped_step_changes_nothing(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflow inside the backbone reaches the statistics of batch norms before any loss tells of it."""
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
    settings: dict[str, Any] = {"data__val_split": "", "train__skip_nonfinite": 1, "train__steps_per_epoch": 3}
    settings |= {"model__norm": "batch", "train__ema": 0.9, "train__checkpoint_steps": 1, "train__keep_checkpoints": 9}
    assert train_script.main(tiny.arguments(dataset, tmp_path / "run", **settings)) == 0
    assert ["skipped" in row for row in tiny.rows(tmp_path / "run/metrics.jsonl")] == [False, True, False]
    states = [load(Location(str(tmp_path / "run")) / f"checkpoints/step-00000{step}") for step in (1, 2, 3)]
    for before, after, later in zip(*((state.weights, state.raw or {}) for state in states), strict=True):
        assert len(before) > 100
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert all(value.isfinite().all() for value in later.values())
        assert not torch.equal(after["backbone.body.bn1.running_mean"], later["backbone.body.bn1.running_mean"])


def test_the_optimizers_settings_act_from_where_a_run_goes_on(dataset: Path, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"train__steps_per_epoch": 1, "data__val_split": ""}
    assert train_script.main(tiny.arguments(dataset, tmp_path / "run", **quick)) == 0
    changed = {"optim__momentum": 0.5, "optim__weight_decay": 0.25}
    assert train_script.main(tiny.arguments(dataset, tmp_path / "run", **quick, **changed, train__epochs=2)) == 0
    found = load_newest(Location(str(tmp_path / "run")))
    assert found is not None
    assert found[1].step == 2
    assert found[1].optimizer is not None
    [group] = found[1].optimizer["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.25)
    assert found[1].optimizer["state"]


@pytest.mark.slow
def test_two_ranks_learn_what_one_does_and_stay_equal_in_every_stage(dataset: Path, tmp_path: Path) -> None:
    script = tmp_path / "hashing.py"
    script.write_text(HASHING)
    settings: dict[str, Any] = {"train__stages": STAGES, "train__steps_per_epoch": 4, "optim__base_batch": 4}
    done = tiny.run(script, [str(tmp_path), *tiny.arguments(dataset, tmp_path / "two", **settings)], ranks=2)
    assert done.returncode == 0, done.stderr
    for step in ("4", "end"):
        assert (tmp_path / f"step-{step}-rank-0").read_text() == (tmp_path / f"step-{step}-rank-1").read_text()
    assert (tmp_path / "step-4-rank-0").read_text() != (tmp_path / "step-end-rank-0").read_text()

    # One rank takes the same two batches a step, one after the other.
    assert train_script.main(tiny.arguments(dataset, tmp_path / "one", **settings, train__accumulate=2)) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 8
    for ours, theirs in zip(one, two):
        assert ours == pytest.approx(theirs, rel=1e-3)
    rows = [tiny.rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for key in ("position", "images", "lr", "samples"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]
    # What the loaders of both ranks read, and not the main rank's alone.
    read = [[row["read_mb"] for row in own] for own in rows]
    assert read[0] == pytest.approx(read[1], rel=1e-4)
    assert min(read[0]) > 0
    assert all(0 < row["data_wait"] <= row["data_wait_longest"] < 1 for row in rows[1])


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_after_the_same_step(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = tiny.start(SCRIPT, tiny.arguments(dataset, run, train__steps_per_epoch=500, data__val_split=""), ranks=2)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_bytes():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    step = len(losses(run))
    assert step < 500
    assert f"train: stopped by a signal after step {step}, which is saved in {run}" in err
    newest = load_newest(Location(str(run)))
    assert newest is not None
    assert (newest[1].step, newest[1].position) == (step, 2 * step)


@pytest.mark.slow
def test_bf16_and_channels_last_learn_about_the_same(dataset: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train__steps_per_epoch": 3, "data__val_split": ""}
    changes = {"train__precision": "bf16", "train__channels_last": "true"}
    done = tiny.run(SCRIPT, tiny.arguments(dataset, tmp_path / "bf16", **settings, **changes))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "bf16/environment.json").read_text())["mixed_precision"] == "bf16"
    assert train_script.main(tiny.arguments(dataset, tmp_path / "fp32", **settings)) == 0
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    for ours, theirs in zip(losses(tmp_path / "bf16"), losses(tmp_path / "fp32")):
        assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=0.1)
    assert all(v.is_contiguous() for v in open_checkpoint(str(tmp_path / "bf16")).weights.values())
