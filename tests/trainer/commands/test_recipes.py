"""The recipes of configs/: each trains at tiny sizes, and at full size none leaves layers random that do not train."""

import argparse
import functools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models import get_model, mobilenet_v2
from torchvision.models.detection import maskrcnn_resnet50_fpn

from shards.format.dataset import Category
from tests.support import REPOSITORY
from tests.trainer import tiny
from trainer.commands import train as train_script
from trainer.commands.compare import read_comparison
from trainer.config.schedule import stages
from trainer.config.settings import Config
from trainer.config.yaml_config import load_config, recipes
from trainer.model.build import build_model
from trainer.model.checkpoint import open_checkpoint
from trainer.model.freeze import check_all_learned, trainable_parameters
from trainer.model.weights import load_weights
from trainer.step.trainable import Trainable

# One epoch of one step; a stage is one.
SIZES = {name: value for name, value in tiny.SETTINGS.items() if name.startswith(("data.", "model."))} | {
    "data.workers": 1,
    "data.min_size": 48,
    "data.max_instances": 8,  # one shape to compile
    "train.steps_per_epoch": 1,
    "train.checkpoint_steps": 1,
    "train.eval_epochs": 1,
    "train.eval_batch_size": 2,
    "run.trackers": [],
}
del SIZES["model.norm"]
TRAFFIC = [Category(i, name, f"/m/{i}") for i, name in enumerate(("Person", "Car", "Traffic light", "Traffic sign"), 1)]
STAGES = "[{layers: heads, epochs: 1}, {layers: 4+, epochs: 1}, {layers: all, epochs: 1, lr: 0.1}]"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[str, Path]:
    """Files in place of torchvision's downloads: a classifier for `imagenet`, a Mask R-CNN for `coco`."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    safetensors.torch.save_file(mobilenet_v2().state_dict(), folder / "imagenet.safetensors")
    tiny.write_checkpoint(folder / "coco", dataset)
    return {"imagenet": folder / "imagenet.safetensors", "coco": folder / "coco"}


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("name", ["coco", "fast", "few-masks", "lsj", "traffic", "traffic-coco", "traffic-heads-first"])
def test_a_recipe_trains(
    name: str, dataset: Path, weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_config(name)
    settings: dict[str, Any] = {**SIZES, "model.weights": weights[recipe.model.weights], "data.shards": dataset}
    settings |= {"train.stages": STAGES} if recipe.train.stages else {"train.epochs": 1}
    settings["run.dir"] = tmp_path
    arguments = ["--config", name]
    arguments += [str(text) for option, value in settings.items() for text in (f"--{option}", value)]
    compile_parts, compiled = Trainable.compile_parts, []

    def compile_quickly(step: Trainable, mode: str) -> None:
        """Trace the same graphs, and run them as they are: Inductor, the default, takes minutes."""
        compiled.append(mode)
        compile_parts(step, backend="eager")

    monkeypatch.setattr(Trainable, "compile_parts", compile_quickly)
    assert train_script.main(arguments) == 0

    rows = tiny.rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 4 if recipe.train.stages else 2))
    assert all(value is not None for row in rows for value in row["losses"].values())
    assert tiny.rows(tmp_path / "evaluations.jsonl")[-1]["step"] == len(rows)
    assert compiled == ([] if recipe.train.compile == "no" else [recipe.train.compile])
    ran, wanted = open_checkpoint(str(tmp_path)).config.to_dict(), recipe.to_dict()
    changed = {f"{part}.{key}" for part in wanted for key in wanted[part] if wanted[part][key] != ran[part][key]}
    assert changed <= settings.keys()


def all_settings() -> dict[str, Config]:
    """The settings of each recipe, and of each run of each comparison."""
    found = {name: load_config(name) for name in recipes()}
    for name in sorted(path.stem for path in (REPOSITORY / "configs").glob("compare-*.yaml")):
        configs = read_comparison(argparse.Namespace(comparison=name, config=None))
        found |= {f"{name}: {setting}": config for setting, config in configs.items()}
    return found


def published(backbone: str, weights: object, name: str) -> dict[str, torch.Tensor]:
    """A state dict in place of torchvision's download: its names and shapes, with other values."""
    with torch.device("meta"):
        coco = name == "coco"
        network = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None) if coco else get_model(backbone)
    return {name: torch.ones(value.shape) for name, value in network.state_dict().items()}


def test_no_recipe_leaves_layers_random_that_do_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: dict[str, tuple[nn.Module, Any]] = {}  # by the settings of the model
    for name, config in all_settings().items():
        key, download = str(config.model), functools.partial(published, config.model.backbone)
        monkeypatch.setattr("trainer.model.weights._download", download)
        if key not in loaded:
            network = build_model(config.model, config.data, 1 + len(TRAFFIC))
            loaded[key] = network, load_weights(network, config.model, TRAFFIC)
        network, report = loaded[key]
        trained = {name for stage in stages(config.train) for name in trainable_parameters(network, stage.layers)}
        check_all_learned(network, report.missing, trained)
        assert trained, name
