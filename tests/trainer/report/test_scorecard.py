"""Tables, CSVs and plots of an evaluation."""

import csv
import io
import re
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from shards.format.dataset import Category
from tests.trainer.metrics.scenes import Pair, evaluate, found, instance, random_pairs, sample
from trainer.metrics.coco import CocoMetric
from trainer.metrics.confusion import Confusion, ConfusionMetric
from trainer.metrics.openimages import OpenImagesMetric
from trainer.metrics.overlaps import EvaluatedImage
from trainer.report.score_plots import draw_confusion, draw_precision_recall, precision_curve
from trainer.report.scorecard import Evaluation, class_csv, confusion_csv, summary

CATEGORIES = (Category(1, "Person", "/m/p"), Category(2, "Car", "/m/c"), Category(5, "A $ & <b>sign</b>", "/m/s"))
A, B, C = (20.0, 20.0, 50.0, 50.0), (100.0, 20.0, 50.0, 50.0), (20.0, 100.0, 50.0, 50.0)


def evaluation_of(pairs: Sequence[Pair]) -> Evaluation:
    return Evaluation(evaluate(CocoMetric(CATEGORIES), *pairs), evaluate(OpenImagesMetric(CATEGORIES), *pairs))


def test_summary_and_class_csv_count_the_detections_that_only_coco_counts_as_errors() -> None:
    unmasked = sample(instance(1, A), instance(1, B, mask=False), instance(2, C, mask=False, group=True))
    detections = found((1, A, 0.6), (1, B, 0.9), (5, C, 0.8), (2, (30.0, 110.0, 20.0, 20.0), 0.7))
    evaluation = evaluation_of([(unmasked, detections)])
    table = summary(evaluation)
    assert table.startswith("1 image, 2 objects, 1 with a mask, 4 detections\n")
    assert "Detections that the Open Images AP leaves out: 3\n" in table
    assert "1 on an object that has a box and no mask: errors by COCO's mask AP, unless they overlap a" in table
    assert "1 of a class that nobody verified in the image: errors by COCO, although they may be right" in table
    assert "1 image without verified labels: training takes the annotations as complete there" in table
    assert "1 in a group-of region of the same class: COCO ignores them as well" in table
    assert re.search(r"^Person +2 +1 +\S+ +\S+ +50\.0 +50\.0 +100\.0$", table, re.M)
    assert re.search(r"^mean +2 +1( +\S+){5}$", table, re.M)
    rows = list(csv.DictReader(io.StringIO(class_csv(evaluation, CATEGORIES))))
    assert ",".join(rows[0]) == (
        "category_id,name,mid,objects,masks,box_ap,box_ap50,mask_ap,mask_ap50,open_images_ap,open_images_objects,"
        "right,wrong,unmasked,group,unverified"
    )
    assert (rows[0]["right"], rows[0]["unmasked"], rows[1]["group"], rows[2]["unverified"]) == ("1", "1", "1", "1")
    assert (rows[0]["objects"], float(rows[0]["mask_ap50"])) == ("2", evaluation.coco.segm.classes[0].ap50)
    assert (rows[2]["name"], rows[2]["mid"], rows[2]["mask_ap"]) == (CATEGORIES[2].name, "/m/s", "")


def test_with_a_hierarchy_the_summary_says_what_is_counted_several_times_and_what_ignores_it() -> None:
    pairs = [(sample(instance(1, A), absent=(2,)), found((1, A, 0.9), (5, B, 0.8)))]
    with_parents = evaluate(OpenImagesMetric(CATEGORIES, {5: (2,)}), *pairs)
    lines = summary(Evaluation(evaluate(CocoMetric(CATEGORIES), *pairs), with_parents)).splitlines()
    assert any(
        line.startswith("Detections that the Open Images AP leaves out, counted once for each") for line in lines
    )
    assert lines[-1] == "The confusion matrix is of classes as annotated, without the hierarchy."
    assert not any("without verified labels" in line for line in lines)
    assert "hierarchy" not in summary(evaluation_of(pairs))


def test_the_mean_of_a_curve_is_the_ap() -> None:
    evaluation = evaluation_of(random_pairs(3, 12))
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
    assert draw_precision_recall(evaluation_of([]))


def test_a_confusion_matrix_computed_by_hand() -> None:
    metric = ConfusionMetric(CATEGORIES, 0.5)
    samples = [
        # A car detected as a person; a person found, but also detected as a car; a missed person.
        sample(instance(2, A), instance(1, B), instance(1, C)),
        # Found by its box; a duplicate; nothing there; below the score; an unverified class.
        sample(instance(1, A, mask=False)),
        sample(instance(1, A, group=True)),
    ]
    detected = [
        found((1, A, 0.9), (2, B, 0.8), (1, B, 0.7)),
        found((1, A, 0.9), (1, A, 0.8), (1, C, 0.7), (1, B, 0.4), (5, B, 0.9)),
        found((1, (30.0, 30.0, 20.0, 20.0), 0.9)),
    ]
    metric.process([EvaluatedImage(*pair) for pair in zip(samples, detected, strict=True)])
    result = metric.evaluate()
    assert result is not None
    assert result.counts.tolist() == [[2, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [2, 1, 0, 0]]
    assert confusion_csv(result).splitlines()[:2] == [
        "annotated / found,Person,Car,A $ & <b>sign</b>,(nothing found)",
        "Person,2,0,0,1",
    ]
    assert metric.evaluate(lambda own: None) is None
    assert draw_confusion(result)


@pytest.mark.parametrize("names", [("Person",), ("x" * 200, "行人"), ("thirty-nine characters of a name, or so",) * 6])
def test_the_confusion_matrix_has_room_for_names_and_title(names: tuple[str, ...]) -> None:
    side = len(names) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = draw_confusion(Confusion(names, np.ones((side, side), np.int64), 0.5))
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(edge.min() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])) == 255  # nothing is cut off
