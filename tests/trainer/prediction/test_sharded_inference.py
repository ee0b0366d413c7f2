"""`predict` on a split of a dataset: parts, resuming, object storage, two ranks."""

import json
import shutil
from pathlib import Path

import pytest

from demo.s3server import S3Server
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from shards.stream.streams import EvalStream
from tests.trainer import tiny
from tests.trainer.commands.test_predict import read_submission, submission_of
from trainer.commands import predict
from trainer.prediction.sharded_inference import Parts

FILES = ("predictions.json", "submission.csv")
LABELS = {1: ["/m/sq"], 2: ["/m/di"]}


def parts_of(out: Path) -> list[Path]:
    return sorted((out / "parts").glob("*/*.jsonl"))


@pytest.fixture(scope="module")
def done(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run in one process. Read only."""
    out = tmp_path_factory.mktemp("done")
    assert predict.main([*tiny.predict_options(checkpoint, dataset), "--out", str(out)]) == 0
    return out


@pytest.fixture
def stopped(done: Path, tmp_path: Path) -> Path:
    """The folder of a run that was killed: 4 of 6 parts, and a part that was being written."""
    out = shutil.copytree(done, tmp_path / "stopped")
    parts = parts_of(out)
    for path in (parts[1], parts[4], out / "predictions.json"):
        path.unlink()
    (parts[0].parent / "part-00001.jsonl.77.1.tmp").write_text("{")
    return out


def test_predict_on_a_split_finds_what_predict_on_its_images_finds(
    checkpoint: Path, dataset: Path, done: Path, tmp_path: Path
) -> None:
    value = json.loads((done / "predictions.json").read_text())
    samples = [sample for batch in EvalStream(open_dataset(str(dataset)), "train", batch_size=24) for sample in batch]
    expected = [(number, f"{sample.image_id}.jpg") for number, sample in enumerate(samples, 1)]
    assert [(entry["id"], entry["file_name"]) for entry in value["images"]] == expected
    assert [one["id"] for one in value["annotations"]] == list(range(1, len(value["annotations"]) + 1))
    assert read_submission(done / "submission.csv") == submission_of(value, LABELS)

    names = [tmp_path / f"{sample.image_id}.jpg" for sample in samples]
    for name, sample in zip(names, samples, strict=True):
        name.write_bytes(sample.image)
    command = ["--checkpoint", str(checkpoint), "--score", "0.1", "--no-pictures", "--out", str(tmp_path / "out")]
    assert predict.main([*command, *map(str, names)]) == 0
    files = json.loads((tmp_path / "out" / "predictions.json").read_text())
    # In other batches: but an image is never padded for the sake of another.
    assert len(files["annotations"]) == len(value["annotations"]) > 24
    for one, other in zip(files["annotations"], value["annotations"], strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.02)


def test_the_same_command_processes_the_missing_parts(
    checkpoint: Path, dataset: Path, done: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in parts_of(stopped)}
    command = [*tiny.predict_options(checkpoint, dataset), "--out", str(stopped)]
    assert predict.main(command) == 0
    output = capsys.readouterr().out
    assert "24 images of train: 4 of 6 parts done already" in output
    assert output.count(".jsonl: ") == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in FILES:
        assert (stopped / name).read_bytes() == (done / name).read_bytes(), name

    parts = parts_of(stopped)
    assert predict.main([*command, "--score", "0.5"]) == 0
    assert "0 of 6 parts done already" in capsys.readouterr().out  # those of another score are not used

    for damaged, problem in ((parts[2].read_text().split("\n", 1)[1], "3 images instead of 4): delete it"), ("{", "")):
        parts[2].write_text(damaged)
        assert predict.main(command) == 2
        error = capsys.readouterr().err
        assert f"{parts[2]} is damaged ({problem}" in error
        assert error.count("\n") == 1


def test_predict_reads_and_writes_a_bucket(
    s3: S3Server, bucket: str, checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    s3.upload(dataset, f"{bucket}/data")
    out = Location(f"s3://{bucket}/found")
    command = ["--checkpoint", f"file://{checkpoint}", "--score", "0.1", "--submission", "--pictures"]
    on_shards = [*command, "--data.shards", f"s3://{bucket}/data", "--data.workers", "2", "--part-images", "1"]
    on_shards += ["--batch-size", "2", "--out", str(out)]
    assert predict.main(on_shards) == 0
    first = (out / "predictions.json").read()
    value = json.loads(first)
    pictures = [f"pictures/{entry['file_name']}" for entry in value["images"]]
    assert [entry["picture"] for entry in value["images"]] == pictures
    assert len(pictures) == 5
    assert all((out / picture).exists() for picture in pictures)
    (tmp_path / "submission.csv").write_bytes((out / "submission.csv").read())
    assert read_submission(tmp_path / "submission.csv") == submission_of(value, LABELS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.prediction.sharded_inference.detect_in_order", None)  # nothing is left to do
        assert predict.main(on_shards) == 0
    assert (out / "predictions.json").read() == first

    # A folder and a glob of the bucket are images as well.
    for asked, expected in (("pictures", pictures), ("pictures/*1.jpg", [p for p in pictures if p.endswith("1.jpg")])):
        assert predict.main([*command, f"{out}/{asked}", "--out", f"{out}/again"]) == 0
        found = json.loads((out / "again/predictions.json").read())["images"]
        assert [entry["file_name"] for entry in found] == [f"{out}/{name}" for name in sorted(expected)]


@pytest.mark.parametrize(("images", "size"), [(1, 1), (4, 4), (5, 4), (9, 3)])
def test_parts_contain_every_row_once(images: int, size: int) -> None:
    parts = Parts(Location("memory://nowhere-parts"), images, size)
    assert [int(row) for number in range(len(parts)) for row in parts.rows(number)] == list(range(images))
    assert parts.missing() == list(range(len(parts)))
