"""The state of a run as training meets it, new or resumed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tests.trainer import tiny
from trainer.commands import train
from trainer.model.backbones import FrozenBatchNorm2d
from trainer.model.build import build_model
from trainer.run.run_state import set_up


def types_of_norms(network: nn.Module) -> set[torch.dtype | None]:
    """The types in which the frozen norms of a network are cached; None for one that is not."""
    norms = [module for module in network.modules() if isinstance(module, FrozenBatchNorm2d)]
    return {None if norm.cached is None else norm.cached[0].dtype for norm in norms}


def test_frozen_norms_are_cached_in_a_new_and_in_a_resumed_run(dataset: Path, tmp_path: Path) -> None:
    options = {"model__norm": "frozen", "train__ema": "0.9", "data__val_split": "", "train__steps_per_epoch": "1"}
    weights = tmp_path / "weights.safetensors"  # whose statistics frozen norms need
    arguments = tiny.arguments(dataset, tmp_path / "run", **options, model__weights=str(weights))
    config = train.parse(arguments)
    save_file(build_model(config.model, config.data, 3).state_dict(), weights)
    new = set_up(config)
    assert types_of_norms(new.network) == {torch.float32}
    assert new.ema is not None
    assert train.main(arguments) == 0
    resumed = set_up(train.parse(arguments))
    assert resumed.step == 1
    assert resumed.ema is not None
    assert types_of_norms(resumed.network) == types_of_norms(resumed.ema.module) == {torch.float32}
