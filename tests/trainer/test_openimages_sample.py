"""The main job on real photographs, from a bucket to an AP, and the metrics on their annotations."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from builder.commands.cli import main as build_shards
from demo.s3server import S3Server
from shards.format import rle
from shards.format.dataset import Category, open_dataset
from shards.format.sample import Sample
from shards.stream.streams import EvalStream
from tests.support import REPOSITORY
from tests.trainer import tiny
from tests.trainer.metrics.reference import open_images_ap, pycocotools_stats
from tests.trainer.metrics.scenes import evaluate
from tests.trainer.metrics.test_coco import numbers
from trainer.commands import train
from trainer.metrics.coco import CocoMetric
from trainer.metrics.openimages import OpenImagesMetric
from trainer.model.inference import Detections

SAMPLE = REPOSITORY / ".." / "shared" / "openimages-sample"

pytestmark = pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"{SAMPLE} does not exist")


@pytest.fixture(scope="module")
def shards(s3: S3Server) -> str:
    """Shards on S3 that are built from S3."""
    s3.make_bucket("photographs")
    for folder in ("open-images-dataset", "openimages"):
        s3.upload(SAMPLE / folder, f"photographs/{folder}")
    root, source = "s3://photographs/shards", "s3://photographs"
    sources = ["--images", f"{source}/open-images-dataset", "--annotations", f"{source}/openimages"]
    assert build_shards(["--per-class", "1000", *sources, "--no-cache", "--out", root]) == 0
    return root


def test_train_from_s3(shards: str, tmp_path: Path) -> None:
    options = tiny.arguments(shards, tmp_path, data__workers=1, train__steps_per_epoch=3)
    assert train.main(options) == 0
    rows = tiny.rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) for row in rows)
    [evaluation] = tiny.rows(tmp_path / "evaluations.jsonl")
    assert evaluation["images"] == len(open_dataset(shards).index("val"))
    assert evaluation["boxes"] > evaluation["masks"] > 0  # the boxes without masks came along


def detect_roughly(sample: Sample, categories: Sequence[Category]) -> Detections:
    """Detections of most objects, near their positions, some of them twice or as other classes."""
    rng = np.random.default_rng([int(c, 16) for c in sample.image_id])
    masks, labels = [], []
    for instance in sample.instances:
        if instance.segmentation is not None:
            mask = rle.decode(instance.segmentation)
        else:
            mask = np.zeros((sample.height, sample.width), np.uint8)
            x, y, w, h = (round(v) for v in instance.bbox)
            mask[y : y + h, x : x + w] = 1
        for _ in range(int(rng.integers(0, 3))):
            shift = rng.normal(0, 0.07 * np.sqrt(mask.sum()), 2).round().astype(int)
            masks.append(rle.encode(np.roll(mask, shift, axis=(0, 1))))
            labels.append(instance.category_id if rng.random() < 0.85 else int(rng.choice([c.id for c in categories])))
    boxes = np.array([rle.bounds(mask) for mask in masks], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.round(rng.random(len(masks)), 2).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    return Detections(boxes[order], np.array(labels, np.int64)[order], scores[order], tuple(masks[i] for i in order))


def test_metrics_agree_with_the_references(shards: str) -> None:
    """Shifted, duplicated and mislabelled masks serve as detections."""
    dataset = open_dataset(shards)
    samples = (
        sample
        for split in ("train", "val", "test")
        for batch in EvalStream(dataset, split, batch_size=4, rank=0, world=1)
        for sample in batch
    )
    pairs = [(one, detect_roughly(one, dataset.categories)) for one in sorted(samples, key=lambda one: one.image_id)]
    by_coco = evaluate(CocoMetric(dataset.categories), *pairs)
    by_open_images = evaluate(OpenImagesMetric(dataset.categories), *pairs)
    assert by_coco.boxes > 1.2 * by_coco.masks > 60
    assert numbers(by_coco.bbox) == pytest.approx(pycocotools_stats("bbox", pairs, dataset.categories), abs=1e-9)
    assert numbers(by_coco.segm) == pytest.approx(pycocotools_stats("segm", pairs, dataset.categories), abs=1e-9)
    assert 0.05 < (by_coco.segm.ap or 0) < (by_coco.bbox.ap or 0) < 0.95
    for one in by_open_images.classes:
        assert one.ap == pytest.approx(open_images_ap(pairs, one.category_id, set()), abs=1e-12)
    assert sum(one.outcomes["unmasked"] for one in by_open_images.classes) > 10
    assert (by_open_images.ap or 0) > (by_coco.segm.ap50 or 0)
