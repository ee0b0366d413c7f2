"""The main job on real photographs, from a bucket to an AP, where that folder is present."""

import math
from pathlib import Path

import pytest

from demo.s3server import S3Server
from shards.format.dataset import open_dataset
from tests.support import REPOSITORY
from tests.trainer import tiny

SAMPLE = REPOSITORY / ".." / "shared" / "openimages-sample"


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"{SAMPLE} is not here")
def test_two_ranks_train_from_s3_on_shards_built_from_s3(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    s3.upload(SAMPLE / "open-images-dataset", f"{bucket}/images")
    s3.upload(SAMPLE / "openimages", f"{bucket}/openimages")
    root, run = f"s3://{bucket}/shards", tmp_path / "run"
    sources = ["--images", f"s3://{bucket}/images", "--annotations", f"s3://{bucket}/openimages"]
    built = tiny.run("-m", ["builder.commands.cli", "--per-class", "1000", *sources, "--out", root])
    assert built.returncode == 0, built.stderr
    changes = {"data.shards": root, "data.workers": 1, "train.steps_per_epoch": 3}
    changed = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    options = [*tiny.arguments(Path("unused"), run), *changed]
    trained = tiny.run(REPOSITORY / "trainer" / "train.py", options, ranks=2)
    assert trained.returncode == 0, trained.stderr
    rows = tiny.rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) for row in rows)
    [evaluation] = tiny.rows(run / "evaluations.jsonl")
    assert evaluation["images"] == len(open_dataset(root).index("val"))
    assert evaluation["boxes"] > evaluation["masks"] > 0  # the boxes without masks came along
