"""The state of a run as training meets it, new or resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, MaskPrediction
from tests.support import write_dataset
from tests.trainer import tiny
from trainer.commands import train
from trainer.model.backbones import FrozenBatchNorm2d
from trainer.model.build import build_model
from trainer.run.run_state import set_up, warn_of_few_masks


def types_of_norms(network: nn.Module) -> set[torch.dtype | None]:
    """The types in which the frozen norms of a network are cached; None for one that is not."""
    norms = [module for module in network.modules() if isinstance(module, FrozenBatchNorm2d)]
    return {None if norm.cached is None else norm.cached[0].dtype for norm in norms}


MASKS_FROM_BOXES = {"model__mask_head": "agnostic", "loss__unmasked": "masks"}


@pytest.mark.parametrize(
    ("settings", "full", "filled", "never", "hardly", "missing"),
    [
        ({}, True, False, "never", "hardly", "--model.mask_head agnostic --loss.unmasked masks"),
        ({"model__mask_head": "agnostic"}, True, False, *["from the other classes"] * 2, "--loss.unmasked masks"),
        ({"loss__unmasked": "masks"}, True, False, *["from boxes"] * 2, "--model.mask_head agnostic"),
        (MASKS_FROM_BOXES, True, False, *["from boxes and from the other classes"] * 2, ""),
        (MASKS_FROM_BOXES, False, False, *["from boxes"] * 2, ""),
        (MASKS_FROM_BOXES, False, True, "from predicted masks and from boxes", "from boxes", ""),
        ({}, True, True, "from predicted masks", "hardly", "--model.mask_head agnostic --loss.unmasked masks"),
        (
            {"loss__predicted": "0", "model__mask_head": "agnostic"},
            False,
            True,
            "never",
            "hardly",
            "--loss.unmasked masks",
        ),
    ],
)
def test_the_start_names_classes_with_no_or_few_masks_and_how_they_learn_them(
    settings: dict[str, str],
    full: bool,
    filled: bool,
    never: str,
    hardly: str,
    missing: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    box = (4.0, 4.0, 30.0, 30.0)
    one = tiny.draw_sample(1)
    masked, bare = Instance(1, box, rle.encode(np.ones((one.height, one.width)))), Instance(2, box, None)
    group = Instance(3, box, None, is_group_of=True)
    instances = (*[masked] * 3, replace(masked, segmentation=None), *[bare] * 12, group)
    instances += (replace(masked, category_id=4),) * full
    if filled:
        prediction = replace(bare, segmentation=masked.segmentation, prediction=MaskPrediction(0.9, "one"))
        instances = tuple(prediction if instance is bare else instance for instance in instances)
    names = ("Square", "Tree", "Crowd", "Disc")
    categories = tuple(Category(number, name, "") for number, name in enumerate(names, 1))
    dataset = write_dataset(tmp_path, {"train": [replace(one, instances=instances)]}, categories=categories)
    warn_of_few_masks(train.parse(tiny.arguments(tmp_path, tmp_path / "run", **settings)), dataset)
    known = "boxes and classes are learnt, masks"
    advice = f"such classes learn masks from boxes and from the other classes with {missing} (recipe few-masks), then"
    assert caplog.messages == [
        f"data.split train: no mask: Tree (0 of 12 objects): {known} {never}",
        f"data.split train: few masks: Square (3 of 4 objects): {known} {hardly}",
        *([f"{advice} with maskstream fill: docs/masks-from-boxes.md"] if missing else []),
    ]


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
