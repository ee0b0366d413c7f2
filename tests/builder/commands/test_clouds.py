"""Builds to Google Cloud Storage and Azure, and streams from there, compared with those of a local disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder.commands.cli import main as build_shards
from demo.scenes import SceneTruth
from shards.inspect.cli import main as inspect_shards
from shards.storage.location import Location
from tests.shards.stream.test_forks import CODE
from tests.support import REPOSITORY

WORDS = ["--classes", "Person", "Car", "--per-class", "12", "--eval-per-class", "2", "--images-per-shard", "8"]


def test_shards_are_built_checked_and_streamed(
    cloud: str, scenes: SceneTruth, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, local = Location(f"{cloud}/some/prefix"), tmp_path / "local"
    sources = ["--images", str(scenes.images), "--annotations", str(scenes.annotations), "--workers", "1"]
    for out in (str(local), root.url):
        assert build_shards([*WORDS, *sources, "--out", out]) == 0
    names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    assert sorted(path.partition("/some/prefix/")[2] for path in root.fs.find(root.path)) == names
    for name in names:
        if name.endswith((".tar", ".parquet")):
            assert (root / name).read() == (local / name).read_bytes()
    mine = root / "train/mine/000000.tar"  # in a deeper folder, which is no concern of a build
    mine.write(b"not a shard")
    for again, said in ((), "already built"), (("--overwrite",), "packed: nothing"):
        assert build_shards([*WORDS, *sources, "--out", root.url, *again]) == 0
        assert said in capsys.readouterr().out
    mine.delete()
    assert inspect_shards([root.url, "--verify"]) == 0

    # Forked loader processes read by obstore, and through fsspec after this process has read itself.
    command = [sys.executable, "-c", CODE, str(local), root.url]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["inspect", "build"])
def test_a_bucket_that_does_not_exist_is_one_line(
    cloud: str, scenes: SceneTruth, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{cloud}-not/x"
    command = [*WORDS, "--images", str(scenes.images), "--annotations", str(scenes.annotations), "--out", url]
    assert (inspect_shards([url]) if missing == "inspect" else build_shards(command)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {'' if missing == 'inspect' else '--out cannot be written: '}{url}" in line
    if not (missing == "inspect" and cloud.startswith("gs")):  # fake-gcs-server answers as for a missing object
        assert line.endswith("does not exist: create it, or correct the URL")
