import json
import time
from pathlib import Path

import numpy as np
import pytest

from demo.s3server import S3Server
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from shards.stream.loader import loader
from shards.stream.streams import EvalStream
from tests.trainer import tiny
from tests.trainer.commands.test_predict import read_submission, submission_of
from trainer.commands import predict
from trainer.prediction.sharded_inference import Parts

SCRIPT = tiny.ROOT / "trainer" / "predict.py"


def options(checkpoint: Path, dataset: Path, out: Path, *more: str) -> list[str]:
    """The 24 images of the training split, in 6 parts of 4."""
    command = [
        "--checkpoint",
        str(checkpoint),
        "--data.shards",
        str(dataset),
        "--data.split",
        "train",
        "--score",
        "0.1",
    ]
    return [*command, "--data.workers", "0", "--batch-size", "2", "--part-images", "3", "--out", str(out), *more]


def parts_of(out: Path) -> list[Path]:
    return sorted((out / "parts").glob("*/*.jsonl"))


@pytest.fixture(scope="module")
def done(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run in one process. Read only."""
    out = tmp_path_factory.mktemp("done")
    assert predict.main(options(checkpoint, dataset, out, "--submission")) == 0
    return out


def test_every_image_once_as_if_it_were_a_file(checkpoint: Path, dataset: Path, done: Path, tmp_path: Path) -> None:
    value = json.loads((done / "predictions.json").read_text())
    samples = [sample for batch in EvalStream(open_dataset(str(dataset)), "train", batch_size=24) for sample in batch]
    assert [entry["file_name"] for entry in value["images"]] == [f"{sample.image_id}.jpg" for sample in samples]
    assert [entry["id"] for entry in value["images"]] == list(range(1, 25))
    assert [one["id"] for one in value["annotations"]] == list(range(1, len(value["annotations"]) + 1))
    assert read_submission(done / "submission.csv") == submission_of(value, {1: ["/m/sq"], 2: ["/m/di"]})

    (tmp_path / "in").mkdir()
    for sample in samples:
        (tmp_path / "in" / f"{sample.image_id}.jpg").write_bytes(sample.image)
    names = [str(tmp_path / "in" / f"{sample.image_id}.jpg") for sample in samples]
    command = ["--checkpoint", str(checkpoint), "--score", "0.1", "--no-pictures", "--out", str(tmp_path / "out")]
    assert predict.main([*command, *names]) == 0
    files = json.loads((tmp_path / "out" / "predictions.json").read_text())
    # One image a batch there: padding differs, so sums are rounded otherwise.
    assert abs(len(files["annotations"]) - len(value["annotations"])) <= 0.02 * len(value["annotations"])
    best, other = (
        [max(a["score"] for a in found["annotations"] if a["image_id"] == number) for number in range(1, 25)]
        for found in (value, files)
    )
    assert best == pytest.approx(other, abs=0.01)


def test_the_same_command_does_only_what_is_missing(
    checkpoint: Path, dataset: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = options(checkpoint, dataset, tmp_path, "--submission")
    assert predict.main(command) == 0
    parts = parts_of(tmp_path)
    assert [path.name for path in parts] == [f"part-{number:05d}.jsonl" for number in range(6)]
    kept = {path: path.stat().st_mtime_ns for path in parts if path.name[9:10] not in "14"}
    for path in set(parts) - set(kept):
        path.unlink()
    (parts[0].parent / "part-00001.jsonl.77.1.tmp").write_text("what a killed process leaves")
    (tmp_path / "predictions.json").unlink()
    capsys.readouterr()
    assert predict.main(command) == 0
    told = capsys.readouterr().out
    assert "24 images of train: 4 of 6 parts done already" in told
    assert told.count(".jsonl: ") == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in ("predictions.json", "submission.csv"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes(), name

    # Another threshold is another result: no part of the first is taken for it.
    assert predict.main([*command, "--score", "0.5"]) == 0
    assert "0 of 6 parts done already" in capsys.readouterr().out

    parts[2].write_text(parts[2].read_text().split("\n", 1)[1])
    assert predict.main(command) == 2
    error = capsys.readouterr().err
    assert f"{parts[2]} is damaged (3 images instead of 4): delete it" in error
    assert error.count("\n") == 1
    parts[2].write_text("{")
    assert predict.main(command) == 2
    assert f"{parts[2]} is damaged (" in capsys.readouterr().err


def test_all_in_a_bucket(s3: S3Server, bucket: str, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    s3.upload(dataset, f"{bucket}/data")
    out = Location(f"s3://{bucket}/found")
    command = ["--checkpoint", str(checkpoint), "--score", "0.1", "--submission", "--pictures"]
    of_shards = [*command, "--data.shards", f"s3://{bucket}/data", "--data.workers", "2", "--part-images", "1"]
    assert predict.main([*of_shards, "--batch-size", "2", "--out", str(out)]) == 0
    first = (out / "predictions.json").read()
    value = json.loads(first)
    assert len(value["images"]) == 5
    for entry in value["images"]:
        assert entry["picture"] == f"pictures/{entry['file_name']}"
        assert (out / entry["picture"]).exists()
    (tmp_path / "submission.csv").write_bytes((out / "submission.csv").read())
    assert read_submission(tmp_path / "submission.csv") == submission_of(value, {1: ["/m/sq"], 2: ["/m/di"]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.model.inference.detect", None)  # there is nothing left to do
        assert predict.main([*of_shards, "--batch-size", "2", "--out", str(out)]) == 0
    assert (out / "predictions.json").read() == first

    # A folder and a glob of the bucket are images as well.
    for asked in ("pictures", "pictures/*1.jpg"):
        assert predict.main([*command, f"{out}/{asked}", "--out", str(tmp_path / "again")]) == 0
        found = json.loads((tmp_path / "again" / "predictions.json").read_text())["images"]
        names = [entry["file_name"] for entry in value["images"] if asked == "pictures" or "1.jpg" in entry["picture"]]
        assert [entry["file_name"] for entry in found] == [f"{out}/pictures/{name}" for name in sorted(names)]


def test_a_wrong_split_is_one_line(
    checkpoint: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main([*options(checkpoint, dataset, tmp_path), "--data.split", "test"]) == 2
    error = capsys.readouterr().err
    assert "there is no split 'test'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_chosen_rows(dataset: Path, workers: int) -> None:
    opened = open_dataset(str(dataset))
    ids = opened.index("train").image_ids.to_pylist()
    rows = np.array([0, 1, 2, 3, 8, 9, 10, 11, 23])
    batches = list(loader(EvalStream(opened, "train", batch_size=2, rows=rows), workers=workers))
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 1]
    assert [sample.image_id for batch in batches for sample in batch] == [ids[row] for row in rows]


@pytest.mark.parametrize(("images", "size"), [(1, 1), (4, 4), (5, 4), (9, 3)])
def test_parts_have_every_row_once(images: int, size: int) -> None:
    parts = Parts(Location("memory://nowhere-parts"), images, size)
    assert [int(row) for number in range(len(parts)) for row in parts.rows(number)] == list(range(images))
    assert parts.missing() == list(range(len(parts)))


@pytest.mark.slow
def test_two_ranks_end_what_a_killed_process_began(checkpoint: Path, dataset: Path, done: Path, tmp_path: Path) -> None:
    command = options(checkpoint, dataset, tmp_path, "--submission")
    killed = tiny.start(SCRIPT, command)
    while not parts_of(tmp_path):
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    left = len(parts_of(tmp_path))
    result = tiny.run(SCRIPT, command, ranks=2)
    assert result.returncode == 0, result.stderr
    assert f"{left} of 6 parts done already" in result.stdout
    assert result.stdout.count(".jsonl: ") == 6 - left
    assert result.stdout.count("predictions.json") == 1
    for name in ("predictions.json", "submission.csv"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes(), name
