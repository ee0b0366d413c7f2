import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from shards.commands.output import print_to_reader
from shards.common.text import columns_of
from shards.format.dataset import Category, finish_dataset
from shards.format.shard_tar import pack_shard
from shards.inspect.cli import main
from shards.inspect.shard_check import Fault
from shards.storage.location import Location
from tests.support import sample, write_dataset


@pytest.fixture
def root(tmp_path: Path) -> str:
    write_dataset(tmp_path, {"train": [sample(n) for n in range(10)], "val": [sample(n) for n in range(10, 13)]})
    return str(tmp_path)


def test_counts_of_every_split_and_class(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([root, "--json"]) == 0
    train, val = json.loads(capsys.readouterr().out)["splits"]
    assert (train["split"], train["images"], train["shards"]) == ("train", 10, 2)
    assert train["classes"] == [
        {"id": 1, "name": "Person", "images": 10, "boxes": 10, "masks": 10, "groups": 0},
        {"id": 2, "name": "Car", "images": 5, "boxes": 5, "masks": 0, "groups": 0},
    ]
    assert (val["images"], val["sizes"]) == (3, {"width": [48] * 3, "height": [32] * 3, "portrait": 0.0})


def test_verified_labels_and_flags_are_counted_in_the_annotations(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every image of `sample` confirms Person; the even ones rule Car out, the odd ones have an occluded car."""
    assert main([root, "--json"]) == 0
    train, _ = json.loads(capsys.readouterr().out)["splits"]
    assert train["labels"]["images"] == 10
    assert train["labels"]["classes"] == {"1": {"present": 10, "absent": 0}, "2": {"present": 0, "absent": 5}}
    assert (train["labels"]["objects"], train["labels"]["flags"]["is_occluded"]) == (15, 5)
    assert main([root, "--json", "--label-images", "4"]) == 0
    train, val = json.loads(capsys.readouterr().out)["splits"]
    assert (train["labels"]["images"], val["labels"]["images"]) == (4, 3)


def test_without_label_images_no_shard_is_read(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in Path(root).rglob("*.tar"):
        shard.unlink()
    assert main([root, "--label-images", "0"]) == 0
    assert "verified" not in capsys.readouterr().out
    assert main([root]) == 2
    error = capsys.readouterr().err
    assert "train/000000.tar: sample 0000000000000000: cannot be read" in error
    assert error.count("\n") == 1


def test_the_table_shows_what_has_no_mask(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([root]) == 0
    out = capsys.readouterr().out
    train, person, car = (
        next(line.split() for line in out.splitlines() if name in line) for name in ("train", "Person", "Car")
    )
    assert train[:3] == ["train", "10", "2"]
    assert person == ["Person", "10", "10", "10", "0%", "0", "100%", "0%"]
    assert car == ["Car", "5", "5", "0", "100%", "0", "0%", "50%"]
    assert "verified as present, as absent: share of all images; 15 annotations in them, 5 occluded" in out
    assert "Car: 100% of objects have a box only (6 of 6)" in out
    assert "Person:" not in out


def test_a_folder_that_is_no_dataset_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("inspect-shards: error: ")
    assert captured.err.count("\n") == 1


def test_help_answers_within_a_second() -> None:
    """Of processor time, which says the same on a machine that has other things to do."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "shards.inspect.cli", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_columns_hold_whatever_the_names_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = pack_shard([sample(1)], split="train", path="train/000000.tar")
    (Location(str(tmp_path)) / packed.shard.path).write(packed.data)
    for names in (["Personal flotation device", "\x1b[2J\n\u202eCar"], ["人" * 20, "Cafe\u0301"]):
        classes = [Category(number, name, "") for number, name in enumerate(names, 1)]
        finish_dataset(Location(str(tmp_path)), packed.rows, [packed.shard], classes)
        assert main([str(tmp_path)]) == 0
        told = capsys.readouterr().out
        assert all(line.isprintable() or "\u0301" in line for line in told.split("\n"))
        lines = told.splitlines()
        head = next(number for number, line in enumerate(lines) if line.startswith("  class "))
        assert len({columns_of(line) for line in lines[head : head + 3]}) == 1
    # A fault is one line, whatever stands in it.
    assert str(Fault("a", "box \n\x1b[2J")) == r"a: box \n\x1b[2J"


@pytest.mark.parametrize("more", [[], ["--json"], ["--help"], ["--verify"]])
def test_who_reads_no_further_ends_the_command_quietly(root: str, more: list[str]) -> None:
    """As `| head` does, also where all of the output still waits in a buffer."""
    if more == ["--verify"]:
        for shard in Path(root).rglob("*.tar"):
            shard.unlink()
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "shards.inspect.cli", root, *more]
    for unbuffered in ("", "1"):
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False)
        assert done.stderr == ""
        assert done.returncode == 141 or (more, unbuffered, done.returncode) == (["--help"], "1", 0)
    os.close(writer)


def test_another_broken_pipe_is_no_reader_that_has_gone() -> None:
    def command() -> int:
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        print_to_reader(command)


def test_no_part_of_the_command_imports_torch() -> None:
    code = (
        "import sys, shards.inspect.cli, shards.inspect.verify, shards.inspect.html_page, shards.inspect.extract; "
        "sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
