"""Class names and ids are stored in the checkpoint, and every command compares them with its dataset."""

import json
from pathlib import Path
from typing import Any

import pytest

from shards.format.dataset import Category
from tests.trainer import tiny
from trainer.commands import evaluate, predict, train
from trainer.model.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the same number of classes, of which the second differs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "CATEGORIES", (Category(1, "Square", "/m/sq"), Category(2, "Ring", "/m/ri")))
        return tiny.write_dataset(tmp_path_factory.mktemp("renamed"), samples=4, val=2)


@pytest.mark.parametrize("command", [evaluate, predict], ids=["evaluate", "predict"])
def test_a_dataset_of_other_classes_is_refused(
    command: Any, checkpoint: Path, renamed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command.main(["--checkpoint", str(checkpoint), "--data.shards", str(renamed), "--out", str(out)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"error: class 2 is 'Ring' in {renamed}, and 'Disc' in the checkpoint {checkpoint}" in line
    assert not out.exists()


def test_predict_processes_images_without_the_classes_of_the_network(dataset: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    settings = {"data__classes": "[Square]", "data__val_split": "", "train__steps_per_epoch": 1}
    assert train.main(tiny.arguments(dataset, run, **settings)) == 0
    words = ["--checkpoint", str(run), "--data.shards", str(dataset), "--data.workers", "0", "--out", str(out)]
    assert predict.main(words) == 0
    assert len(json.loads((out / "predictions.json").read_text())["images"]) == 5  # with squares or without


def test_weights_of_other_classes_are_loaded_without_their_class_specific_layers(
    checkpoint: Path, renamed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the same number of classes; and the new run's checkpoint has the new names."""
    caplog.set_level("INFO")
    options = tiny.arguments(renamed, tmp_path, model__weights=checkpoint, train__steps_per_epoch=1, data__val_split="")
    assert train.main(options) == 0
    assert "class 2 is 'Ring' here and 'Disc' there" in caplog.text
    assert [category.name for category in open_checkpoint(str(tmp_path)).categories] == ["Square", "Ring"]
