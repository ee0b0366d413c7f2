"""The cost of a training step, counted on the CPU in the form that a GPU runs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step_cost
from tests.support import REPOSITORY
from tests.trainer import tiny
from trainer.config.settings import ModelConfig


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "backbone", "precision", "most"),
    [
        ("maskstream", "resnet18", "float32", 837),
        ("maskstream", "resnet50", "bfloat16", 1645),
        (step_cost.BOXES, "resnet18", "float32", 1392),
    ],
)
def test_kernels_do_not_grow_with_the_batch_and_the_host_waits_once(
    side: str, backbone: str, precision: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The counts do not depend on widths.
    widths: dict[str, Any] = {"fpn_channels": 8, "box_head_features": 8, "mask_head_channels": [8] * 4}
    monkeypatch.setattr(step_cost, "ModelConfig", partial(ModelConfig, **widths))
    options = argparse.Namespace(device="cpu", backbone=backbone, max_size=64, precision=precision)
    small, large = (step_cost.count(side, images, objects, options) for images, objects in ((2, 5), (8, 20)))
    assert small.kernels == large.kernels
    assert small.kernels.total() <= most
    for counter in (small, large):
        assert +counter.synchronisations == {"tolist in trainer/step/host_copy.py:read": 1}


def test_the_counter_sees_what_waits() -> None:
    values = torch.arange(6.0)
    with step_cost.StepCounter() as counter:
        values[values > 2] = 0  # filled in by one kernel
        values[torch.tensor([0, 1])] = 1.0  # the number is copied to the device first
        values[values > 0].sum().item()
        values.tolist()
    names = {name.partition(" ")[0]: count for name, count in (+counter.synchronisations).items()}
    assert names == {"lift_fresh": 1, "index_put_": 1, "index": 1, "_local_scalar_dense": 1, "tolist": 1}


@pytest.mark.slow
def test_the_comparison_on_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--quick", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=REPOSITORY, env=tiny.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "gpu.json").read_text())
    assert {cell["side"] for cell in measured["steps"]} == set(measured["evaluation"]) == {"torchvision", "maskstream"}
    assert "| maskstream |" in done.stdout
