import csv
import html.parser
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shards.format.dataset import Category
from tests.trainer import tiny
from tests.trainer.metrics.test_coco import detections, instance, random_pairs, sample
from trainer.commands import evaluate
from trainer.metrics.coco import CocoMetric
from trainer.metrics.confusion import ConfusionMetric
from trainer.metrics.openimages import OpenImagesMetric
from trainer.metrics.overlaps import compare
from trainer.model.inference import Detections
from trainer.report.best_worst_page import BestWorstPage, ImageScore
from trainer.report.score_plots import draw_confusion, draw_precision_recall, precision_curve
from trainer.report.scorecard import Evaluation, class_csv, confusion_csv, summary

CATEGORIES = (Category(1, "Person", "/m/p"), Category(2, "Car", "/m/c"), Category(5, "A $ & <b>sign</b>", "/m/s"))
FILES = {"evaluation.json", "classes.csv", "curves.png", "confusion.csv", "confusion.png", "images.html"}
A, B, C = (20.0, 20.0, 50.0, 50.0), (100.0, 20.0, 50.0, 50.0), (20.0, 100.0, 50.0, 50.0)


def evaluation_of(pairs: Any) -> Evaluation:
    coco, open_images = CocoMetric(CATEGORIES), OpenImagesMetric(CATEGORIES)
    for one, found in pairs:
        images = compare([one], [found])
        coco.process(images)
        open_images.process(images)
    by_coco, by_open_images = coco.evaluate(), open_images.evaluate()
    assert by_coco is not None
    assert by_open_images is not None
    return Evaluation(by_coco, by_open_images)


def test_evaluate_prints_a_table_and_writes_all_files(
    checkpoint: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["--checkpoint", str(checkpoint), "--data.shards", str(dataset), "--data.workers", "0", "--out", str(out)]
    assert evaluate.main([*command, "--score", "0.2", "--pictures", "2"]) == 0
    table = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    value = json.loads((out / "evaluation.json").read_text())
    assert (value["split"], value["step"], value["images"]) == ("val", 1, 5)
    assert (value["score_threshold"], value["detections_per_image"]) == (0.05, 20)
    assert value["masks"] < value["boxes"]
    assert f"{value['boxes']} objects, {value['masks']} with a mask" in table
    for kind in ("bbox", "segm", "open_images"):
        assert [entry["name"] for entry in value[kind]["classes"]] == ["Square", "Disc"]
        assert 0 <= value[kind]["ap"] <= 1
    for word in ("boxes", "masks", "Square", "Disc", "AP50", "AR100", "Open Images", "evaluation.json"):
        assert word in table
    rows = list(csv.DictReader(io.StringIO((out / "classes.csv").read_text())))
    assert [row["mid"] for row in rows] == ["/m/sq", "/m/di"]
    assert sum(int(row["masks"]) for row in rows) == value["masks"]
    assert float(rows[0]["mask_ap50"]) == value["segm"]["classes"][0]["ap50"]
    counts = np.array(value["confusion"]["counts"])
    assert counts[:2].sum() == value["boxes"]
    for name in ("curves.png", "confusion.png"):
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    assert (out / "images.html").read_text().count("<figure>") >= 2


def test_evaluate_with_other_thresholds_and_a_hierarchy(
    checkpoint: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = tiny.SETTINGS | {"model.score_threshold": 0.7}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SETTINGS", config)
        tiny.write_checkpoint(run, dataset)
    command = ["--checkpoint", str(run), "--data.shards", str(dataset), "--data.workers", "0", "--pictures", "0"]
    assert evaluate.main(command) == 0
    low = json.loads((run / "evaluation-val" / "evaluation.json").read_text())
    text = capsys.readouterr().out
    assert "scores of 0.05 or more, NMS at 0.5, at most 20 detections per image" in text
    assert "the checkpoint's own: score_threshold 0.7" in text
    assert [entry["objects"] for entry in low["open_images"]["classes"]] == [
        m["objects"] for m in low["segm"]["classes"]
    ]
    tree = {"LabelName": "/m/all", "Subcategory": [{"LabelName": "/m/sq", "Subcategory": [{"LabelName": "/m/di"}]}]}
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    command += ["--hierarchy", str(tmp_path / "tree.json")]
    assert evaluate.main([*command, "--score-threshold", "0.7", "--detections", "3"]) == 0
    high = json.loads((run / "evaluation-val" / "evaluation.json").read_text())
    assert (high["score_threshold"], high["detections_per_image"]) == (0.7, 3)
    assert high["detections"] < low["detections"]
    assert low["detections"] > 3 * low["images"]
    assert high["parents"] == {"2": [1]}
    assert [entry["objects"] for entry in high["open_images"]["classes"]] == [
        high["masks"],
        high["segm"]["classes"][1]["objects"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.split", "test"], "there is no split 'test'"),
        (["--score-threshold", "1.5"], "--score-threshold is 1.5: it must be between 0 and 1"),
        (["--score-threshold", "nan"], "--score-threshold is nan: give a finite number"),
        (["--nms-threshold", "nan"], "--nms-threshold is nan: give a finite number"),
        (["--score", "nan"], "--score is nan: give a finite number"),
        (["--detections", "0"], "--detections is 0: it must be at least 1"),
        (["--data.workers", "-1"], "--data.workers is -1: it must be at least 0"),
        (["--hierarchy", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert evaluate.main(["--checkpoint", str(checkpoint), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_out_folder_that_cannot_be_written_is_reported_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = "/proc/nowhere: cannot be written (/proc is not a writable folder): choose another --out"
    assert evaluate.main(["--checkpoint", "/nowhere", "--out", "/proc/nowhere"]) == 2
    assert capsys.readouterr().err == f"evaluate: error: {message}\n"


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
    # A missing checkpoint is reported as such.
    assert evaluate.main(["--checkpoint", "/proc/nowhere"]) == 2
    assert "/proc/nowhere: there is no checkpoint" in capsys.readouterr().err


def test_summary_counts_detections_that_only_coco_counts_as_errors() -> None:
    unmasked = sample("a", instance(1, A), instance(1, B, mask=False), instance(2, C, mask=False, group=True))
    found = detections((1, A, 0.6), (1, B, 0.9), (5, C, 0.8), (2, (30.0, 110.0, 20.0, 20.0), 0.7))
    evaluation = evaluation_of([(unmasked, found)])
    assert evaluation.coco.segm.classes[0].ap50 == pytest.approx(0.5)
    assert evaluation.open_images.classes[0].ap == 1
    table = summary(evaluation)
    assert table.startswith("1 image, 2 objects, 1 with a mask, 4 detections\n")
    assert "Detections that the Open Images AP leaves out: 3\n" in table
    assert "1 on an object that has a box and no mask: COCO's mask AP counts each as an error" in table
    assert "1 of a class that nobody verified in the image: COCO counts each as an error" in table
    assert "1 in a group-of region of the same class: COCO ignores them as well" in table
    assert re.search(r"^Person +2 +1 +\S+ +\S+ +50\.0 +50\.0 +100\.0$", table, re.M)
    rows = list(csv.DictReader(io.StringIO(class_csv(evaluation, CATEGORIES))))
    assert (rows[0]["right"], rows[0]["unmasked"], rows[1]["group"], rows[2]["unverified"]) == ("1", "1", "1", "1")
    assert rows[2]["name"] == CATEGORIES[2].name
    assert rows[2]["mask_ap"] == ""


def test_the_mean_of_a_curve_is_the_ap() -> None:
    evaluation = evaluation_of(random_pairs(12))
    for k, scores in enumerate(evaluation.open_images.classes):
        assert scores.ap is not None
        curve = precision_curve(scores)
        assert curve.shape == (101,)
        assert (np.diff(curve) <= 0).all()
        assert curve.mean() == pytest.approx(scores.ap, abs=0.02)
        coco = evaluation.coco.segm
        assert coco.precision50[k].mean() == pytest.approx(coco.classes[k].ap50)
    with Image.open(io.BytesIO(draw_precision_recall(evaluation))) as picture:
        assert picture.size == (1400, 600)
    assert draw_precision_recall(evaluation_of([]))  # nothing at all


def test_a_confusion_matrix_computed_by_hand() -> None:
    metric = ConfusionMetric(CATEGORIES, 0.5)
    samples = [
        # A car detected as a person; a person found, but also detected as a car; a missed person.
        sample("a", instance(2, A), instance(1, B), instance(1, C)),
        # Found by its box; a duplicate; nothing there; below the score; an unverified class.
        sample("b", instance(1, A, mask=False)),
        sample("c", instance(1, A, group=True)),
    ]
    found = [
        detections((1, A, 0.9), (2, B, 0.8), (1, B, 0.7)),
        detections((1, A, 0.9), (1, A, 0.8), (1, C, 0.7), (1, B, 0.4), (5, B, 0.9)),
        detections((1, (30.0, 30.0, 20.0, 20.0), 0.9)),
    ]
    metric.process(compare(samples, found))
    result = metric.evaluate()
    assert result is not None
    assert result.counts.tolist() == [[2, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [2, 1, 0, 0]]
    table = list(csv.reader(io.StringIO(confusion_csv(result))))
    assert table[0] == ["annotated / found", "Person", "Car", CATEGORIES[2].name, "(nothing found)"]
    assert metric.evaluate(lambda own: None) is None
    assert draw_confusion(result)


class Tags(html.parser.HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_the_worst_and_the_best_of_all_ranks() -> None:
    categories = tiny.CATEGORIES
    drawn = [tiny.draw_sample(i) for i in range(1, 9)]
    batches = []
    for i, one in enumerate(drawn):
        masked = [obj for obj in one.instances if obj.segmentation and not obj.is_group_of]
        kept = masked if i % 2 else masked[:0]
        boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in (o.bbox for o in kept)], np.float32).reshape(-1, 4)
        labels, scores = np.array([o.category_id for o in kept], np.int64), np.full(len(kept), 0.9, np.float32)
        found = Detections(boxes, labels, scores, tuple(o.segmentation for o in kept if o.segmentation))
        pixels = np.asarray(Image.open(io.BytesIO(one.image)).convert("RGB"))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        batches.append(([image], compare([replace(one, image=b"")], [found])))
    whole = BestWorstPage(categories, {}, 3, 0.5)
    ranks = [BestWorstPage(categories, {}, 3, 0.5) for _ in range(2)]
    for i, batch in enumerate(batches):
        whole.add(*batch)
        ranks[i % 2].add(*batch)
    title = 'run <script>alert(1)</script> & "co"'
    page = whole.render(title)
    assert page is not None
    others: list[Any] = []
    assert ranks[1].render(title, lambda own: others.extend(own)) is None
    assert ranks[0].render(title, lambda own: [*own, *others]) == page

    tags = Tags(page)
    pictures = [attributes for tag, attributes in tags.tags if tag == "img"]
    assert len(pictures) == 2 * 6
    assert all((attributes["src"] or "").startswith("data:image/jpeg;base64,") for attributes in pictures)
    assert not [tag for tag, _ in tags.tags if tag in ("script", "link", "iframe")]
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page)
    assert title in tags.text
    assert "F1 0.00, 0 right, 0 wrong," in tags.text
    assert "0 wrong, 0 missed" in tags.text


def test_verdicts_are_sorted_by_f1() -> None:
    good, fair, bad, awful = (
        ImageScore("g", 5, 0, 0),
        ImageScore("f", 1, 1, 0),
        ImageScore("b", 0, 0, 1),
        ImageScore("a", 0, 3, 2),
    )
    assert (good.f1, fair.f1, bad.f1) == pytest.approx((1, 2 / 3, 0))
    assert sorted([good, fair, bad, awful], key=lambda v: v.worst) == [awful, bad, fair, good]
    assert sorted([fair, ImageScore("h", 6, 0, 0), good], key=lambda v: v.best)[0].right == 6
