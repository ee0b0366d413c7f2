"""The command `maskstream export`: its target folder, its errors, and where it reads from."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from demo.s3server import S3Server
from shards.export.cli import main
from shards.export.export import MARKER, write
from shards.format.dataset import Dataset
from shards.format.sample import Sample
from tests.builder.builds import tree
from tests.support import sample, write_dataset

FORMATS = ("coco", "yolo", "rfdetr", "folder")
Capture = pytest.CaptureFixture[str]


def export(dataset: Dataset | str, out: Path | str, to: str, *more: str) -> int:
    return main([str(dataset if isinstance(dataset, str) else dataset.root), "--to", to, "--out", str(out), *more])


def test_an_interrupted_export_is_completed_by_the_same_command(
    scenes: Dataset, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    written: list[Path] = []

    def stop_at_the_third(place: Path, data: bytes) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(place)
        write(place, data)

    with monkeypatch.context() as patched:
        patched.setattr("shards.export.coco.write", stop_at_the_third)
        assert export(scenes, out, "coco") == 130
    assert not list(out.rglob("*.json*")) or list(out.rglob("*.json*")) == [out / MARKER]
    assert export(scenes, out, "coco") == 0
    assert export(scenes, tmp_path / "whole", "coco") == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_splits_can_be_exported_one_after_the_other(scenes: Dataset, out: Path, tmp_path: Path) -> None:
    for split in ("val", "train"):
        assert export(scenes, out, "yolo", "--split", split) == 0
    assert export(scenes, tmp_path / "whole", "yolo") == 0
    assert tree(out) == tree(tmp_path / "whole")


def other_file(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").touch()


def other_export(out: Path) -> None:
    assert main([str(out.parent / "scenes"), "--to", "yolo", "--out", str(out), "--fraction", "0.9"]) == 0


@pytest.mark.parametrize(
    ("before", "arguments", "message"),
    [
        (
            other_file,
            "scenes --to yolo --out out",
            "out: the folder holds 'thesis.tex', which is no export: give --out",
        ),
        (other_export, "scenes --to yolo --out out", "holds an export with fraction 0.9, not 1.0: give another --out"),
        (Path.touch, "scenes --to yolo --out out", "out: cannot be written"),
        (None, "scenes --to yolo --out s3://bucket/out", "--out is s3://bucket/out: other trainers read files"),
        (None, "scenes --to yola --out out", "invalid choice: 'yola'"),
        (None, "scenes --to yolo --uot out", "unknown argument --uot: did you mean --out?"),
        (None, "scenes --to yolo", "required: --out"),
        (None, "scenes --to yolo --out out --split training", "there is no split 'training': it has train, val"),
        (None, "scenes --to yolo --out out --classes Persn", "there is no class 'Persn': did you mean Person?"),
        (None, "nothing --to yolo --out out", "not a shard dataset"),
    ],
)
def test_a_wrong_argument_or_folder_is_one_line(
    before: Callable[[Path], Any] | None,
    arguments: str,
    message: str,
    scenes: Dataset,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(out.parent)
    Path("scenes").symlink_to(scenes.root.path)
    if before is not None:
        before(out)
    held = tree(out.parent)
    capsys.readouterr()
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("export: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert tree(out.parent) == held  # nothing was written


@pytest.mark.parametrize("key", ["/tmp/escaped", "a/../../b"])
def test_a_key_that_is_a_path_does_not_leave_the_folder(key: str, tmp_path: Path, out: Path, capsys: Capture) -> None:
    members = sample(1).to_members()
    with patch.object(Sample, "to_members", lambda _: members):
        write_dataset(tmp_path / "data", {"train": [replace(sample(1), image_id=key)]})
    assert export(str(tmp_path / "data"), out, "folder") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(out.rglob("*.jpg"))


def test_s3_and_http_give_the_same_files(scenes: Dataset, s3: S3Server, bucket: str, tmp_path: Path) -> None:
    s3.upload(Path(scenes.root.path), bucket)
    for name, root in (("disk", scenes), ("s3", f"s3://{bucket}"), ("http", f"{s3.endpoint_url}/{bucket}")):
        assert export(root, tmp_path / name, "rfdetr") == 0
    assert tree(tmp_path / "disk") == tree(tmp_path / "s3") == tree(tmp_path / "http")


def test_no_format_imports_torch(scenes: Dataset, tmp_path: Path) -> None:
    code = f"""if True:
        import sys
        from shards.export.cli import main
        for to in {FORMATS}:
            assert main([{str(scenes.root)!r}, "--to", to, "--out", f"{tmp_path}/{{to}}"]) == 0
        assert not {{"torch", "torchvision", "pandas", "webdataset", "matplotlib"}} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
