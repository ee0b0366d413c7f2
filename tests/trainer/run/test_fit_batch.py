"""The batch size that is found by trying."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torchvision.models.detection import MaskRCNN

from shards.format.dataset import open_dataset
from tests.trainer import tiny
from trainer.commands import train
from trainer.config.settings import ConfigError
from trainer.data.instances import Batch
from trainer.run import fit_batch
from trainer.run.fit_batch import fits, largest
from trainer.run.run_state import build_network, set_up
from trainer.step.trainable import Trainable


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 12, 100, 511, 512, 10_000])
def test_largest_is_possible_and_less_than_an_eighth_below_the_limit(limit: int) -> None:
    tried: list[int] = []

    def is_possible(images: int) -> bool:
        tried.append(images)
        return images <= limit

    found, expected = largest(is_possible), min(limit, fit_batch.MOST)
    assert found <= expected <= found + max(0, found // 8 - 1)
    assert len(tried) <= 14


def limited(limit: int) -> Callable[..., dict[str, torch.Tensor]]:
    """The step of a device whose memory holds a number of images."""
    forward = Trainable.forward

    def limited_forward(self: Trainable, batch: Batch, teacher: MaskRCNN | None) -> dict[str, torch.Tensor]:
        assert teacher is not None  # needs memory, too
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, teacher=teacher)

    return limited_forward


def test_fits_runs_steps_until_memory_is_full(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"train__ema": "0.9", "loss__unmasked": "masks"}
    config = train.parse(tiny.arguments(dataset, tmp_path / "run", **options))
    network = build_network(config, open_dataset(config.data.shards))
    monkeypatch.setattr(Trainable, "forward", limited(3))
    accelerator = Accelerator(cpu=True)
    assert [fits(config, network, 3, images, accelerator) for images in (4, 3)] == [False, True]


def test_auto_needs_a_gpu_and_a_resumed_run_keeps_its_number(dataset: Path, tmp_path: Path) -> None:
    options = {"data__val_split": "", "train__steps_per_epoch": "1", "train__epochs": "1"}
    auto = tiny.arguments(dataset, tmp_path / "run", **options | {"data__batch_size": "auto"})
    with pytest.raises(ConfigError, match=r"^data.batch_size is auto, which needs a GPU, and"):
        set_up(train.parse(auto))
    assert train.main(tiny.arguments(dataset, tmp_path / "run", **options | {"data__batch_size": "3"})) == 0
    assert set_up(train.parse(auto)).config.data.batch_size == 3
