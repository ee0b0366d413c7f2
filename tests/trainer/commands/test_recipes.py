"""Each recipe of configs/ trains, stops and goes on: at tiny sizes, with its other options as they are. At full size
none leaves random what its starting weights do not hold."""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torchvision.models import get_model, resnet18
from torchvision.models.detection import maskrcnn_resnet50_fpn

from shards.format.dataset import Category
from tests.trainer import tiny
from trainer.commands import train as train_script
from trainer.commands.compare import read_comparison
from trainer.config.schedule import stages
from trainer.config.settings import Config
from trainer.config.yaml_config import load_config
from trainer.model.build import build_model
from trainer.model.checkpoint import open_checkpoint
from trainer.model.freeze import check_all_learned, trainable_parameters
from trainer.model.weights import load_weights

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
TRAFFIC = [Category(i, name, f"/m/{i}") for i, name in enumerate(("Person", "Car", "Traffic light", "Traffic sign"), 1)]
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
@pytest.mark.parametrize("name", ["coco", "fast", "lsj", "traffic", "traffic-coco", "traffic-heads-first"])
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


def recipes() -> dict[str, Config]:
    """All settings of configs/: each recipe, and each setting of each comparison."""
    found: dict[str, Config] = {}
    for path in sorted((tiny.ROOT / "configs").glob("*.yaml")):
        if path.stem.startswith("compare-"):
            configs = read_comparison(argparse.Namespace(comparison=str(path), config=None))
            found |= {f"{path.stem}: {name}": config for name, config in configs.items()}
        else:
            found[path.stem] = load_config(str(path))
    return found


def published(name: str, backbone: str) -> dict[str, torch.Tensor]:
    """What stands for torchvision's download: its names and shapes, and no values to speak of."""
    with torch.device("meta"):
        coco = name == "coco"
        network = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None) if coco else get_model(backbone)
    return {name: torch.ones(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in recipes().items()])
def test_no_recipe_leaves_random_what_its_weights_do_not_hold(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.model.weights._download", lambda weights, name: published(name, config.model.backbone))
    network = build_model(config.model, config.data, 1 + len(TRAFFIC))
    report = load_weights(network, config.model, TRAFFIC)
    trained = {name for stage in stages(config.train) for name in trainable_parameters(network, stage.layers)}
    check_all_learned(network, report.missing, trained)
