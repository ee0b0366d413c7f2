import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from shards.commands.command_line import print_to_reader
from shards.inspect.cli import main
from tests.support import REPOSITORY, filled, sample, write_dataset

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def root(tmp_path: Path) -> str:
    write_dataset(tmp_path, {"train": [sample(n) for n in range(10)], "val": [sample(n) for n in range(10, 13)]})
    return str(tmp_path)


def test_json_counts_classes_sizes_labels_and_flags(root: str, capsys: Capture) -> None:
    """Every image verifies Person as present; even ones verify Car as absent, odd ones have an occluded car."""
    assert main([root, "--json"]) == 0
    train, val = json.loads(capsys.readouterr().out)["splits"]
    assert (train["split"], train["images"], train["shards"]) == ("train", 10, 2)
    assert train["classes"] == [
        {"id": 1, "name": "Person", "images": 10, "boxes": 10, "masks": 10, "predicted": 0, "groups": 0},
        {"id": 2, "name": "Car", "images": 5, "boxes": 5, "masks": 0, "predicted": 0, "groups": 0},
    ]
    assert (val["images"], val["sizes"]) == (3, {"width": [48] * 3, "height": [32] * 3, "portrait": 0.0})
    assert train["labels"]["images"] == 10
    assert train["labels"]["classes"] == {"1": {"present": 10, "absent": 0}, "2": {"present": 0, "absent": 5}}
    assert (train["labels"]["objects"], train["labels"]["flags"]["is_occluded"]) == (15, 5)
    assert main([root, "--json", "--label-images", "4"]) == 0
    assert [split["labels"]["images"] for split in json.loads(capsys.readouterr().out)["splits"]] == [4, 3]


def test_text_has_tables_of_splits_and_classes(root: str, capsys: Capture) -> None:
    assert main([root]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[3:11] == [
        "split  images  shards   MB  median size  width     height    portrait",
        "train      10       2  0.0  48x32        48 to 48  32 to 32        0%",
        "val         3       1  0.0  48x32        48 to 48  32 to 32        0%",
        "",
        "train",
        "  class   images  boxes  masks  box only  group-of  present  absent",
        "  Person      10     10     10        0%         0     100%      0%",
        "  Car          5      5      0      100%         0       0%     50%",
    ]
    assert "verified as present, as absent: share of all images; 15 annotations in them, 5 occluded" in out
    assert "Car: 100% of objects have a box only (6 of 6)" in out
    assert "Person:" not in out


def test_predicted_masks_have_a_column_of_their_own(tmp_path: Path, capsys: Capture) -> None:
    write_dataset(tmp_path, {"train": [filled(1), sample(3)]})
    assert main([str(tmp_path), "--label-images", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[7:10]] == [
        ["class", "images", "boxes", "masks", "predicted", "box", "only", "group-of"],
        ["Person", "2", "2", "2", "0", "0%", "0"],
        ["Car", "2", "2", "0", "1", "50%", "0"],
    ]
    assert "predicted: masks that a trained model predicted, for training only" in "\n".join(lines)
    assert main([str(tmp_path), "--json"]) == 0
    [train] = json.loads(capsys.readouterr().out)["splits"]
    assert train["classes"][1] == {
        "id": 2,
        "name": "Car",
        "images": 2,
        "boxes": 2,
        "masks": 0,
        "predicted": 1,
        "groups": 0,
    }


def delete_shards(root: str) -> None:
    for shard in Path(root).rglob("*.tar"):
        shard.unlink()


def test_without_label_images_no_shard_is_read(root: str, capsys: Capture) -> None:
    delete_shards(root)
    assert main([root, "--label-images", "0"]) == 0
    assert "verified" not in capsys.readouterr().out
    assert main([root]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "train/000000.tar: sample 0000000000000000: cannot be read" in error


@pytest.mark.parametrize("option", ["--json", "--verify"])
def test_a_folder_without_a_dataset_is_a_one_line_error(tmp_path: Path, capsys: Capture, option: str) -> None:
    assert main([str(tmp_path), option]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith("inspect-shards: error: ")


@pytest.mark.parametrize(("options", "unbuffered"), [(["--help"], ""), (["--verify"], "1")])
def test_a_closed_pipe_ends_the_command_quietly(root: str, options: list[str], unbuffered: str) -> None:
    """As with `| head`, also if all of the output is still in a buffer."""
    delete_shards(root)  # --verify has lines to print
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "maskstream", "inspect", root, *options]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)


COMMANDS = re.findall(r"^    (inspect-shards .*)$", (REPOSITORY / "docs/inspecting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_guide(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = replace(sample(1), image_id="000a1249af2bc5f0")
    write_dataset("traffic", {"train": [sample(0), named], "val": [sample(2)]})
    assert main(shlex.split(command.replace("s3://bucket/traffic", "traffic"))[1:]) == 0
    written = {path.name for path in tmp_path.iterdir()} - {"traffic"}
    assert written == ({"traffic.html"} if "--html" in command else {"look"} if "--extract" in command else set())


def test_a_broken_pipe_of_something_else_is_raised() -> None:
    with pytest.raises(BrokenPipeError, match="of a worker"):
        print_to_reader(Mock(side_effect=BrokenPipeError("of a worker")))


def test_help_imports_no_pandas_and_nothing_imports_torch() -> None:
    code = """if True:
        import sys
        from shards.inspect.cli import main
        try:
            main(["--help"])
        except SystemExit:
            assert not {"torch", "pandas", "pyarrow"} & sys.modules.keys()
        import shards.inspect.verify, shards.inspect.html_page, shards.inspect.extract, shards.inspect.text_report
        import shards.format.dataset_writer
        assert not {"torch", "webdataset", "matplotlib"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
