import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.s3server import S3Server
from shards.format.sample import Sample
from shards.inspect.cli import main
from shards.inspect.extract import mask_names
from tests.support import CATEGORIES, filled, sample, write_dataset, write_spoilt


def test_extract_writes_the_jpeg_the_json_and_the_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [sample(n) for n in range(4)]
    write_dataset(tmp_path / "data", {"train": samples[:2], "test": samples[2:]})
    out = tmp_path / "out"
    ids = [samples[1].image_id, samples[2].image_id]
    assert main([str(tmp_path / "data"), "--out", str(out), "--extract", *ids]) == 0
    # Sample 1 has a car without a mask, sample 2 has no car.
    names = [f"{image_id}{end}" for image_id in ids for end in (".jpg", ".json", "_m01g317_b0.png")]
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for wanted in samples[1:3]:
        assert (out / f"{wanted.image_id}.jpg").read_bytes() == wanted.image
        assert (out / f"{wanted.image_id}.json").read_bytes() == wanted.to_members()["json"]
        with Image.open(out / f"{wanted.image_id}_m01g317_b0.png") as picture:
            assert picture.mode == "1"
            assert np.array_equal(np.asarray(picture), wanted.masks()[0])
    assert main([str(tmp_path / "data"), "--out", str(tmp_path / "none"), "--extract", "../../x"]) == 2
    assert re.search(r"^[^\n]*there is no sample '../../x'[^\n]*\n$", capsys.readouterr().err)
    assert not (tmp_path / "none").exists()


def test_extract_from_and_to_a_bucket(s3: S3Server, bucket: str) -> None:
    write_dataset(f"s3://{bucket}/data", {"train": [sample(0)]})
    assert main([f"s3://{bucket}/data", "--out", f"s3://{bucket}/out", "--extract", sample(0).image_id]) == 0
    assert len(s3.filesystem().ls(f"{bucket}/out")) == 3
    assert json.loads(s3.filesystem().cat_file(f"{bucket}/out/{sample(0).image_id}.json"))["author"] == "Zoë & <Søn>"


def names_of(*parts: tuple[str, str]) -> list[str]:
    """The names of masks with these labels and box ids, without the image's id."""
    one: Sample = sample(0)
    instances = tuple(replace(one.instances[0], label=label, box_id=box_id) for label, box_id in parts)
    return [name.removeprefix(f"{one.image_id}_") for name in mask_names(replace(one, instances=instances), CATEGORIES)]


def test_mask_names_are_those_of_open_images_or_numbers() -> None:
    assert names_of(("/m/01jfm_", "a1b2c3d4")) == ["m01jfm__a1b2c3d4.png"]
    assert names_of(("", "a1b2c3d4")) == ["m01g317_a1b2c3d4.png"]  # the class's own MID
    assert names_of(("traffic light", "17"), ("/m/04yx4", "")) == ["0.png", "1.png"]
    assert mask_names(filled(1), CATEGORIES)[1] == f"{filled(1).image_id}_1_predicted.png"
    assert names_of(("/m/04yx4", "b"), ("/m/04yx4", "b"), ("/m/04yx4", "c")) == ["0.png", "1.png", "m04yx4_c.png"]


@pytest.mark.parametrize("label", ["/m/../../x", "../../etc/passwd", "/m/a\0b", "/m/a\n", "/m/" + 300 * "a", "//m/x"])
def test_mask_names_stay_in_the_folder(label: str) -> None:
    assert names_of((label, "b0")) == ["0.png"]
    assert names_of(("/m/04yx4", label)) == ["0.png"]


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda v: v["annotations"][0]["segmentation"].update(counts="é"), "the RLE cannot be decoded"),
        (lambda v: v["annotations"][1].update(bbox=[float("nan")] * 4), "is not finite"),
        (lambda v: v.update(title="\ud800"), "surrogates not allowed"),
    ],
)
def test_a_sample_with_a_fault_is_neither_drawn_nor_extracted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[dict[str, Any]], Any], fault: str
) -> None:
    key = write_spoilt(tmp_path / "data", edit)
    out = tmp_path / "out"
    for options in (["--extract", key, "--out", str(out)], ["--html", str(out)]):
        assert main([str(tmp_path / "data"), *options]) == 2
        error = capsys.readouterr().err
        assert f"train/000000.tar: sample {key}: " in error
        assert fault in error
        assert error.count("\n") == 1
    assert not out.exists()
