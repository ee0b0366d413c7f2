import json
import subprocess
import sys
import time

import pytest

from shards.report import main
from tests.support import sample, write_dataset


@pytest.fixture
def root(tmp_path):
    write_dataset(tmp_path, {"train": [sample(n) for n in range(10)], "val": [sample(n) for n in range(10, 13)]})
    return str(tmp_path)


def test_counts_of_every_split_and_class(root, capsys):
    assert main([root, "--json"]) == 0
    train, val = json.loads(capsys.readouterr().out)["splits"]
    assert (train["split"], train["images"], train["shards"]) == ("train", 10, 2)
    assert train["classes"] == [
        {"name": "Person", "images": 10, "boxes": 10, "masks": 10, "groups": 0},
        {"name": "Car", "images": 5, "boxes": 5, "masks": 0, "groups": 0},
    ]
    assert (val["images"], val["median_width"], val["median_height"]) == (3, 48, 32)


def test_the_table_shows_what_has_no_mask(root, capsys):
    assert main([root]) == 0
    out = capsys.readouterr().out
    assert "train: 10 images in 2 shards" in out
    person, car = (next(line.split() for line in out.splitlines() if name in line) for name in ("Person", "Car"))
    assert person == ["Person", "10", "10", "10", "100%", "0"]
    assert car == ["Car", "5", "5", "0", "0%", "0"]


def test_a_folder_that_is_no_dataset_ends_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("inspect-shards: error: ")
    assert captured.err.count("\n") == 1


def test_help_answers_within_a_second():
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "shards.report", "--help"], check=True, capture_output=True)
    assert time.monotonic() - start < 1.0
