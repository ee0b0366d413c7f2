import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.format.sample import MaskPrediction, Sample
from tests.support import write_dataset
from tests.trainer import tiny
from trainer.commands import evaluate

FILES = {"evaluation.json", "classes.csv", "curves.png", "confusion.csv", "confusion.png", "images.html"}


def test_evaluate_prints_a_table_and_writes_all_files_also_with_other_thresholds_and_a_hierarchy(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SETTINGS, "model.score_threshold", 0.7)
        tiny.write_checkpoint(run, dataset)
    out = run / "evaluation-val"
    command = ["--checkpoint", str(run), "--data.shards", str(dataset), "--data.workers", "0"]
    assert evaluate.main([*command, "--score", "0.2", "--pictures", "2"]) == 0
    table = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    value = json.loads((out / "evaluation.json").read_text())
    assert (value["split"], value["step"], value["images"]) == ("val", 1, 5)
    assert (value["score_threshold"], value["detections_per_image"]) == (0.05, 20)
    assert value["masks"] < value["boxes"]
    for kind in ("bbox", "segm", "open_images"):
        assert [entry["name"] for entry in value[kind]["classes"]] == ["Square", "Disc"]
        assert 0 <= value[kind]["ap"] <= 1
    objects = [entry["objects"] for entry in value["segm"]["classes"]]
    assert [entry["objects"] for entry in value["open_images"]["classes"]] == objects
    for words in (
        f"{value['boxes']} objects, {value['masks']} with a mask",
        "scores of 0.05 or more, NMS at 0.5, at most 20 detections per image",
        "the checkpoint's own: score_threshold 0.7",
        *("boxes", "masks", "Square", "Disc", "AP50", "AR100", "Open Images", "evaluation.json"),
    ):
        assert words in table
    rows = list(csv.DictReader(io.StringIO((out / "classes.csv").read_text())))
    assert [row["mid"] for row in rows] == ["/m/sq", "/m/di"]
    assert sum(int(row["masks"]) for row in rows) == value["masks"]
    assert float(rows[0]["mask_ap50"]) == value["segm"]["classes"][0]["ap50"]
    counts = np.array(value["confusion"]["counts"])
    assert counts[:2].sum() == value["boxes"]
    for name in ("curves.png", "confusion.png"):
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    assert (out / "images.html").read_text().count("<figure ") >= 2

    tree = {"LabelName": "/m/all", "Subcategory": [{"LabelName": "/m/sq", "Subcategory": [{"LabelName": "/m/di"}]}]}
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    command += ["--pictures", "0", "--hierarchy", str(tmp_path / "tree.json")]
    assert evaluate.main([*command, "--score-threshold", "0.7", "--detections", "3"]) == 0
    other = json.loads((out / "evaluation.json").read_text())
    assert (other["score_threshold"], other["detections_per_image"]) == (0.7, 3)
    assert other["detections"] < value["detections"]
    assert value["detections"] > 3 * value["images"]
    assert other["parents"] == {"2": [1]}
    assert [entry["objects"] for entry in other["open_images"]["classes"]] == [other["masks"], objects[1]]


def test_a_predicted_mask_is_no_truth(checkpoint: Path, tmp_path: Path) -> None:
    """The evaluation, its tables and its page are those of a split where the object has a box only."""
    filled = [with_prediction(tiny.draw_sample(number)) for number in range(5)]
    assert any(one != one.without_predictions() for one in filled)
    found = []
    for name, samples in (("filled", filled), ("boxes", [one.without_predictions() for one in filled])):
        write_dataset(tmp_path / name, {"val": samples}, categories=tiny.CATEGORIES)
        command = ["--checkpoint", str(checkpoint), "--data.shards", str(tmp_path / name), "--data.workers", "0"]
        assert evaluate.main([*command, "--score", "0.1", "--pictures", "3", "--out", str(tmp_path / "out")]) == 0
        files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        found.append({key: data.replace(str(tmp_path / name).encode(), b"ROOT") for key, data in files.items()})
    assert found[0].keys() == FILES
    assert found[0] == found[1]


def with_prediction(sample: Sample) -> Sample:
    """Return a sample whose second object, where there is one, has a predicted mask."""
    first, *others = sample.instances
    others[:1] = [replace(one, prediction=MaskPrediction(0.9, "run")) for one in others[:1] if one.segmentation]
    return replace(sample, instances=(first, *others))


def test_a_checkpoint_folder_that_cannot_be_written_is_reported_before_the_evaluation(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "evaluate", None)
    run = shutil.copytree(checkpoint, tmp_path / "run")
    (run / "evaluation-val").touch()
    assert evaluate.main(["--checkpoint", str(run)]) == 2
    place = run / "evaluation-val"
    message = f"{place}: cannot be written ({place} is not a writable folder): choose another --out"
    assert capsys.readouterr().err == f"evaluate: error: {message}\n"
