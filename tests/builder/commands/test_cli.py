import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builder.commands.cli import main
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


def test_the_public_bucket_is_read_unsigned_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    assert source_location("s3://open-images-dataset").anonymous
    assert not source_location("s3://open-images-dataset-mine").anonymous
    assert not source_location("s3://bucket/prefix").anonymous
    assert source_location("s3://bucket/prefix", anonymous=True).anonymous
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    assert not source_location("s3://open-images-dataset").anonymous


def test_unknown_class_is_one_line_with_near_names(scenes: SceneTruth, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = one_line(build_shards("--classes", "Persn", "--per-class", "5", *local(scenes), "--out", str(out)))
    assert "'Persn'" in line
    assert "did you mean Person" in line
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
