"""Each recipe of configs/ trains, stops and goes on: at tiny sizes, with its other options as they are."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torchvision.models import resnet18

from tests.trainer import tiny
from trainer import train as train_script
from trainer.checkpoint import open_checkpoint
from trainer.config import load_config

# Two epochs of one step; a stage is one.
SIZES = {
    **{name: tiny.SETTINGS[name] for name in tiny.SETTINGS if name.startswith("model.") and name != "model.norm"},
    "data.batch_size": 2,
    "data.workers": 1,
    "data.min_size": 48,
    "data.max_size": 64,
    "train.steps_per_epoch": 1,
    "train.checkpoint_steps": 1,
    "train.eval_epochs": 1,
    "train.eval_batch_size": 2,
    "run.trackers": [],
}
STAGES = "[{layers: heads, epochs: 1}, {layers: 4+, epochs: 1}, {layers: all, epochs: 1, lr: 0.1}]"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[str, Path]:
    """What stands for torchvision's downloads: a classifier for `imagenet`, a Mask R-CNN for `coco`."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    safetensors.torch.save_file(resnet18().state_dict(), folder / "imagenet.safetensors")
    tiny.write_checkpoint(folder / "coco", dataset)
    return {"imagenet": folder / "imagenet.safetensors", "coco": folder / "coco"}


@pytest.fixture
def fresh_accelerator() -> Any:
    """accelerate keeps a process to the arithmetic that it began with."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("name", ["coco", "fast", "lsj", "traffic", "traffic-heads-first"])
def test_a_recipe_trains_stops_and_goes_on(
    name: str, dataset: Path, weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.ROOT / "configs" / f"{name}.yaml"
    recipe = load_config(str(path))
    settings: dict[str, Any] = {**SIZES, "model.weights": weights[recipe.model.weights], "data.shards": dataset}
    settings |= {"train.stages": STAGES} if recipe.train.stages else {"train.epochs": 2}
    settings["run.dir"] = tmp_path
    arguments = ["--config", str(path)]
    arguments += [str(text) for option, value in settings.items() for text in (f"--{option}", value)]
    # Inductor, the default, takes minutes; dynamo and autograd trace the same graphs for a backend without a compiler.
    compiled, compile_module = [], nn.Module.compile

    def compile_quickly(module: nn.Module) -> None:
        compiled.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)

    train_step = train_script.train_step

    def stopping(t: Any, *rest: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(t, *rest)

    monkeypatch.setattr(train_script, "train_step", stopping)
    assert train_script.main(arguments) == 128 + signal.SIGTERM
    monkeypatch.setattr(train_script, "train_step", train_step)
    assert train_script.main(arguments) == 0

    rows = tiny.rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 3 + bool(recipe.train.stages)))
    assert all(value is not None for row in rows for value in row["losses"].values())
    assert tiny.rows(tmp_path / "evaluations.jsonl")[-1]["step"] == len(rows)
    assert len(compiled) == 2 * recipe.train.compile
    ran, wanted = open_checkpoint(str(tmp_path)).config.to_dict(), recipe.to_dict()
    changed = {f"{part}.{key}" for part in wanted for key in wanted[part] if wanted[part][key] != ran[part][key]}
    assert changed <= settings.keys()
