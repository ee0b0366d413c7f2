"""The command train: what it trains on, the files of a run, and how it resumes.

`test_two_ranks.py` shows that a resumed run equals an uninterrupted one.
"""

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from demo.s3server import S3Server
from shards.format.dataset import open_dataset
from shards.inspect import cli as inspect
from shards.storage.location import Location
from tests.trainer import tiny
from trainer.commands import evaluate, predict, train
from trainer.config.yaml_config import load_config
from trainer.model.checkpoint import load, open_checkpoint
from trainer.run.distributed import tracker_folder


def test_a_run_folder_in_a_bucket_that_does_not_exist_is_reported_before_anything_is_loaded(
    s3: S3Server, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The weights do not exist either, and would be reported next.
    arguments = tiny.arguments(dataset, Path(), run__dir="s3://no-such-bucket/run", model__weights="/nowhere")
    assert train.main(arguments) == 2
    message = "--run.dir cannot be written: s3://no-such-bucket/run/.probe: the bucket does not"
    assert capsys.readouterr().err.startswith(f"train: error: {message}")


def test_a_run_on_part_of_a_dataset_and_settings_with_which_it_does_not_resume(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    part: dict[str, Any] = {"data__classes": "[Disc]", "data__fraction": 0.7, "data__repeat_threshold": 0.9}
    part["train__steps_per_epoch"] = 1
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert train.main(tiny.arguments(dataset, run, **part)) == 0
    assert "training on Disc: objects of the dataset's other classes are background" in caplog.text
    state = open_checkpoint(str(run))
    assert [(category.id, category.name) for category in state.categories] == [(2, "Disc")]
    assert state.order["repeat_threshold"] == 0.9
    [row] = tiny.rows(run / "evaluations.jsonl")
    assert row["images"] == len(open_dataset(str(dataset)).select(classes=["Disc"]).index("val"))
    # The evaluation of the checkpoint selects the same classes.
    assert evaluate.main(["--checkpoint", str(run), "--data.split", "val", "--data.workers", "0"]) == 0

    # Other settings are refused.
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run / "batches.jpg" in files
    for change, message in (
        ({"data__fraction": 0.9}, "data.fraction"),
        ({"data__repeat_threshold": 0.5}, "data.repeat_threshold 0.9, now it is 0.5"),
        ({"data__classes": "[]"}, "classes {2: 'Disc'}, now it is"),
        ({"data__batch_size": 3}, "data.batch_size 2, now it is 3"),
        ({"data__shards": tiny.write_dataset(tmp_path / "other", samples=20)}, "data.shards"),
        ({"model__fpn_channels": 24}, "model.fpn_channels 16, now it is 24"),
        ({"train__seed": 5}, "train.seed 0, now it is 5"),
    ):
        assert train.main(tiny.arguments(dataset, run, **(part | change))) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert (message in error, "give another --run.dir" in error) == (True, True), error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_a_run_on_an_object_store_continues_with_more_epochs_and_new_settings(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Location(f"memory:/{tmp_path}/run")
    metrics, evaluations = run / "metrics.jsonl", run / "evaluations.jsonl"
    settings = {"run__dir": run, "run__pictures": 2, "run__trackers": "[tensorboard]", "train__steps_per_epoch": 1}

    def train_until(epochs: int, **changes: Any) -> None:
        changes |= settings | {"train__epochs": epochs}
        assert train.main(tiny.arguments(dataset, tmp_path, **changes)) == 0
        assert load_config(f"{run}/config.yaml").train.epochs == epochs
        for file in (metrics, evaluations):
            assert [json.loads(line)["step"] for line in file.read().splitlines()] == list(range(1, epochs + 1))

    train_until(1)
    train_until(2, optim__momentum=0.5, optim__weight_decay=0.25)
    optimizer = load(run / "checkpoints/step-000002").optimizer
    assert optimizer is not None
    [group] = optimizer["param_groups"]
    assert (group["momentum"], group["weight_decay"], bool(optimizer["state"])) == (0.5, 0.25, True)
    assert open_checkpoint(run.url).step == 2
    assert open_checkpoint(f"{run}/best").step in (1, 2)
    table = list(csv.DictReader(io.StringIO((run / "metrics.csv").read().decode())))
    rows = [json.loads(line) for line in metrics.read().splitlines()]
    assert [float(row["loss_mask"]) for row in table] == [row["losses"]["loss_mask"] for row in rows]
    assert (run / "curves.png").read().startswith(b"\x89PNG")
    assert b"| training | 2 steps in " in (run / "README.md").read()
    files = [str(name).partition("/run/")[2] for name in run.fs.find(run.path)]
    assert sum(name.startswith("tensorboard/maskstream/events.out") for name in files) == 2  # one per process
    for step in (1, 2):
        assert [name for name in files if name.startswith(f"pictures/step-{step:06d}/img10")]
    assert not Path(tracker_folder(run)).exists()

    # A finished run repeats an evaluation that was interrupted.
    before = metrics.read(), evaluations.read()
    evaluations.write(before[1][: before[1].index(b"\n") + 20])
    with caplog.at_level(logging.INFO, logger="trainer"):
        train_until(2)
    assert "is finished (2 steps): raise train.epochs to continue it" in caplog.text
    assert (metrics.read(), evaluations.read()) == before


def test_a_run_without_a_better_evaluation_ends_and_says_what_it_has(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"train__steps_per_epoch": 1, "train__epochs": 5, "train__patience": 1, "optim__lr": 0}
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert train.main(tiny.arguments(dataset, run, **settings)) == 0
        for _ in range(2):  # the same command ends at once
            assert len(tiny.rows(run / "evaluations.jsonl")) == len(tiny.rows(run / "metrics.jsonl")) == 2
            assert "1 evaluation without a better one: the run ends here (train.patience)" in caplog.text
            assert f"next      maskstream predict --checkpoint {run}/best --out" in caplog.text
            caplog.clear()
            assert train.main(tiny.arguments(dataset, run, **settings)) == 0


def test_predict_processes_images_without_the_classes_of_the_network(dataset: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    settings = {"data__classes": "[Square]", "data__val_split": "", "train__steps_per_epoch": 1}
    assert train.main(tiny.arguments(dataset, run, **settings)) == 0
    words = ["--checkpoint", str(run), "--data.shards", str(dataset), "--data.workers", "0", "--out", str(out)]
    assert predict.main(words) == 0
    assert len(json.loads((out / "predictions.json").read_text())["images"]) == 5  # with squares or without


@pytest.mark.usefixtures("fresh_accelerator")
def test_credentials_of_urls_are_in_no_file_and_no_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = f"memory://me:hunter2@{tmp_path.name}"
    tiny.write_dataset(f"{place}/data", samples=4, val=2)  # type: ignore[arg-type]
    tiny.write_checkpoint(f"{place}/start", f"{place}/data")  # type: ignore[arg-type]
    settings = {"train__steps_per_epoch": 1, "run__dir": f"{place}/run", "data__shards": f"{place}/data"}
    settings["model__weights"] = f"{place}/start"
    arguments = tiny.arguments(place, tmp_path, **settings)
    with patch("sys.argv", ["train.py", *arguments]):
        assert train.main(arguments) == 0
        assert train.main([*arguments, "--train.epochs", "2"]) == 0  # the run is still the same
    common = ["--checkpoint", f"{place}/run", "--out", f"{place}/out", "--data.workers", "0"]
    assert evaluate.main(common) == 2
    assert "credentials of its dataset, memory://***@" in capfd.readouterr().err
    shards = ["--data.shards", f"{place}/data"]
    assert evaluate.main([*common, *shards]) == 0
    assert predict.main([*common, *shards]) == 0
    Location(f"{place}/a.jpg").write(tiny.draw_sample(0).image)
    words = [f"{place}/a.jpg", f"{place}/none.jpg", "--checkpoint", f"{place}/run", "--out", f"{place}/found"]
    assert predict.main(words) == 1
    assert inspect.main([f"{place}/data", "--verify", "--json"]) == inspect.main([f"{place}/data", "--json"]) == 0
    assert inspect.main([f"{place}/data", "--html", f"{place}/page.html"]) == 0
    root = Location(place)
    files = [str(name) for name in root.fs.find(root.path)]
    assert len(files) > 20
    assert [name for name in files if b"hunter2" in root.fs.cat_file(name)] == []
    captured = capfd.readouterr()
    assert "memory://***@" in captured.out
    assert "hunter2" not in captured.out + captured.err


def test_weights_of_other_classes_are_loaded_without_their_class_specific_layers(
    checkpoint: Path, renamed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the same number of classes; and the new run's checkpoint has the new names."""
    caplog.set_level("INFO")
    options = tiny.arguments(renamed, tmp_path, model__weights=checkpoint, train__steps_per_epoch=1, data__val_split="")
    assert train.main(options) == 0
    assert "class 2 is 'Ring' here and 'Disc' there" in caplog.text
    assert [category.name for category in open_checkpoint(str(tmp_path)).categories] == ["Square", "Ring"]


def test_resume_continues_its_own_run_or_starts_from_a_named_checkpoint(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, epochs: int, *more: str) -> tuple[int, str]:
        settings = {"train__epochs": epochs, "train__steps_per_epoch": 1, "train__keep_checkpoints": 9}
        words = tiny.arguments(dataset, tmp_path / name, **settings, data__val_split="")
        status = train.main([*words, *more])
        return status, (capsys.readouterr().err.splitlines() or [""])[-1]

    error = f"train: error: {tmp_path}/one: there is no checkpoint to resume: "
    status, line = run("one", 2, "--resume")
    assert status == 2
    assert line.startswith(error)
    assert run("one", 2)[0] == 0
    assert run("one", 3, "--resume")[0] == 0
    assert len(tiny.rows(tmp_path / "one/metrics.jsonl")) == 3

    # A run in another folder starts from a given checkpoint, and then resumes from its own.
    first = str(tmp_path / "one/checkpoints/step-000001")
    assert run("two", 2, "--resume", first)[0] == 0
    assert (tmp_path / "two" / "batches.jpg").exists()
    assert run("two", 3, "--resume", first)[0] == 0
    assert tiny.rows(tmp_path / "two/metrics.jsonl")[0]["step"] == 2
    one, two = (open_checkpoint(str(tmp_path / name)).weights for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    # It evaluates the checkpoint if an evaluation is due, before it has a step of its own to draw.
    assert run("three", 2, "--resume", first, "--data.val_split", "val")[0] == 0
    assert [row["step"] for row in tiny.rows(tmp_path / "three/evaluations.jsonl")] == [1, 2]
    assert (tmp_path / "three/curves.png").exists()

    status, line = run("one", 3, "--resume", first)
    assert status == 2
    assert f"beyond {first}" in line
    assert "to step 3: give another --run.dir" in line

    status, line = run("one", 3, "--train.stages", "[{layers: heads, epochs: 4}]")
    assert status == 2
    assert "train.layers (at step 3) 'all', now it is 'heads'" in line
