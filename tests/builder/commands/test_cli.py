import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builder.commands.cli import command_line, main, make_parser
from builder.sources.base import FLAGS
from builder.sources.openimages.layout import source_location
from demo.s3server import S3Server
from demo.scenes import SceneTruth
from tests.support import REPOSITORY


def build_shards(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "builder.commands.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0]
    assert lines[0].startswith("build-shards: error: ")
    return lines[0]


def local(scenes: SceneTruth) -> list[str]:
    return ["--images", str(scenes.images), "--annotations", str(scenes.annotations)]


def test_help_and_wrong_arguments_answer_at_once() -> None:
    heavy = ("torch", "webdataset", "pandas", "pyarrow", "numpy", "PIL")
    started = time.monotonic()
    shown = build_shards("--help")
    wrong = build_shards("--per-class", "many")
    assert time.monotonic() - started < 5  # two interpreters on a busy machine; one takes about 0.1 s
    assert shown.returncode == 0
    assert "examples:" in shown.stdout
    assert "./shards-data" in shown.stdout
    assert wrong.returncode == 2
    assert "--per-class" in wrong.stderr
    code = "import sys; from builder.commands import cli; cli.make_parser(); "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--per-class"),
        (["--per-class", "0"], "at least 1"),
        (["--per-class", "-3"], "per-class"),
        (["--per-class", "5", "--classes"], "--classes"),
        (["--per-class", "5", "--partition", "0.8", "0.1", "0.1"], "--splits partition"),
        (["--per-class", "5", "--splits", "partition", "--partition", "0", "0", "0"], "greater than 0"),
        (["--per-class", "5", "--splits", "partition", "--partition", "0.8", "nan", "0.1"], "nan"),
        (["--per-class", "5", "--worker", "2"], "--worker"),
        (["--per-class", "5", "--drop", "depiction,blurred"], "'blurred' is not one of depiction, inside"),
        (["--per-class", "5", "--min-predicted-iou", "80"], "0 to 1"),
        (["--per-class", "5", "--images-list", "ids.txt"], "leave out --per-class"),
        (["--eval-per-class", "5", "--images-list", "ids.txt"], "leave out --per-class"),
        (["--per-class", "5", "--annotations", "a", "b"], "--source coco"),
        (["--source", "coco"], "needs --images"),
        (["--source", "coco", "--images", "/x"], "needs --images"),
        (["--source", "coco", "--images", "x", "--splits", "partition", "--annotations", "train=a", "val=b"], "cuts"),
    ],
)
def test_wrong_arguments_are_told(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_per_class_alone_is_a_complete_command() -> None:
    args = make_parser().parse_args(["--per-class", "1000"])
    assert "--classes Person Car 'Traffic light' 'Traffic sign'" in command_line(args)
    assert args.images == "s3://open-images-dataset"
    assert args.annotations == ["https://storage.googleapis.com/openimages"]
    assert args.out == "./shards-data"


def test_the_command_on_the_card_asks_for_the_same() -> None:
    words = "--classes Person x --per-class 7 --splits partition --partition 0.5 0.25 0.25 --exact-classes --seed 3"
    words += " --min-predicted-iou 0.75 --drop inside,depiction --require-mask --all-annotations"
    words += " --source coco --images i --annotations train=a val=b"
    args = make_parser().parse_args([*words.split(), "--out", "/a b", "--workers", "9", "--overwrite"])
    shown = command_line(args)
    assert "workers" not in shown
    assert "'/a b'" in shown
    import shlex

    again = make_parser().parse_args(shlex.split(shown)[1:])
    for name in ("classes", "per_class", "eval_per_class", "splits", "partition", "exact_classes", "seed", "out"):
        assert getattr(again, name) == getattr(args, name)
    for name in ("min_predicted_iou", "drop", "require_mask", "all_annotations", "source", "images", "annotations"):
        assert getattr(again, name) == getattr(args, name)
    listed = make_parser().parse_args(["--images-list", "my ids.txt"])
    assert "--images-list 'my ids.txt'" in command_line(listed)
    assert "per-class" not in command_line(listed)


def test_the_public_bucket_is_read_unsigned_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    assert source_location("s3://open-images-dataset").anonymous
    assert not source_location("s3://open-images-dataset-mine").anonymous
    assert not source_location("s3://bucket/prefix").anonymous
    assert source_location("s3://bucket/prefix", anonymous=True).anonymous
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    assert not source_location("s3://open-images-dataset").anonymous


def test_flags_that_can_be_dropped_are_those_that_there_are() -> None:
    args = make_parser().parse_args(["--per-class", "1", "--drop", ",".join(FLAGS)])
    assert set(args.drop) == set(FLAGS)


def test_unknown_class_is_one_line_with_near_names(scenes: SceneTruth, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = one_line(build_shards("--classes", "Persn", "--per-class", "5", *local(scenes), "--out", str(out)))
    assert "'Persn'" in line
    assert "'Person'" in line
    assert not out.exists()


def test_bad_places_are_one_line_each(
    s3_scenes: SceneTruth, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    images, annotations = "s3://open-images-dataset", "s3://openimages"
    missing = "s3://no-such-bucket"
    cases = [
        (missing, annotations, out, "no-such-bucket"),
        (images, missing, out, "no-such-bucket"),
        (images, annotations, f"{missing}/x", "no-such-bucket"),
        (images, annotations, "s3://", "it names no bucket"),
        (images, annotations, "/proc/nowhere", "/proc/nowhere: cannot be written (/proc is not a writable folder)"),
        (str(tmp_path / "gone"), annotations, out, "no such folder"),
        (images, str(tmp_path / "gone"), out, "no such object"),
        (images, "nosuch://x", out, "nosuch"),
        (images, "http://127.0.0.1:9/x", out, "cannot be reached"),
    ]
    for at, tables, to, told in cases:
        assert main(["--per-class", "5", "--images", at, "--annotations", tables, "--out", to]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("build-shards: error: ")
        assert told in line
    assert not Path(out).exists()


def test_missing_credentials_are_one_line(s3: S3Server, tmp_path: Path) -> None:
    unsigned = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    unsigned["AWS_SHARED_CREDENTIALS_FILE"] = unsigned["AWS_CONFIG_FILE"] = str(tmp_path / "none")
    arguments = ["--per-class", "5", "--images", "s3://open-images-dataset", "--out", str(tmp_path / "out")]
    assert "credentials" in one_line(build_shards(*arguments, **unsigned))


def test_an_unreachable_s3_endpoint_is_one_line(tmp_path: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    started = time.monotonic()
    result = build_shards("--per-class", "5", "--images", "s3://images", "--out", str(tmp_path / "o"), **keys)
    assert "cannot be reached" in one_line(result)
    assert time.monotonic() - started < 30


def test_the_command_from_s3_to_s3(s3: S3Server, s3_scenes: SceneTruth, bucket: str) -> None:
    arguments = ["--classes", "Person", "Car", "--per-class", "1000", "--workers", "1", "--images-per-shard", "16"]
    arguments += ["--images", "s3://open-images-dataset", "--annotations", "s3://openimages"]
    result = build_shards(*arguments, "--out", f"s3://{bucket}/some/prefix")
    assert result.returncode == 0, result.stderr
    assert f"inspect-shards s3://{bucket}/some/prefix" in result.stdout
    assert "not packed: nothing" in result.stdout
    names = {path.removeprefix(f"{bucket}/some/prefix/") for path in s3.filesystem().find(bucket)}
    assert {"dataset.json", "index.parquet", "accounts.parquet", "README.md", "train/000000.tar"} <= names
    assert not any(name.startswith(".build") for name in names)
    again = build_shards(*arguments, "--out", f"s3://{bucket}/some/prefix")
    assert again.returncode == 0
    assert "already built" in again.stdout
