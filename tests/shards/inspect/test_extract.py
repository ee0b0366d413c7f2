"""`inspect-shards --extract`: the files of one image again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.s3server import S3Server
from shards.format import rle
from shards.format.sample import Sample
from shards.inspect.cli import main
from shards.inspect.extract import mask_names
from tests.support import CATEGORIES, sample, write_dataset, write_spoilt


def test_the_jpeg_the_json_and_the_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [sample(n) for n in range(4)]
    write_dataset(tmp_path / "data", {"train": samples[:2], "test": samples[2:]})
    out = tmp_path / "out"
    ids = [samples[1].image_id, samples[2].image_id]
    assert main([str(tmp_path / "data"), "--out", str(out), "--extract", *ids]) == 0
    told = capsys.readouterr().out.splitlines()
    assert sorted(told) == sorted(str(path) for path in out.iterdir())
    # Sample 1 has a car without a mask, sample 2 has none.
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{image_id}{end}" for image_id in ids for end in (".jpg", ".json", "_m01g317_b0.png")
    )
    for wanted in samples[1:3]:
        assert (out / f"{wanted.image_id}.jpg").read_bytes() == wanted.image
        assert (out / f"{wanted.image_id}.json").read_bytes() == wanted.to_members()["json"]
        with Image.open(out / f"{wanted.image_id}_m01g317_b0.png") as picture:
            assert (picture.mode, picture.size) == ("1", (48, 32))
            segmentation = wanted.instances[0].segmentation
            assert segmentation is not None
            assert np.array_equal(np.asarray(picture), rle.decode(segmentation) == 1)


def named(*parts: tuple[str, str]) -> list[str]:
    one: Sample = sample(0)
    instances = tuple(replace(one.instances[0], label=label, box_id=box_id) for label, box_id in parts)
    return [name.removeprefix(f"{one.image_id}_") for name in mask_names(replace(one, instances=instances), CATEGORIES)]


def test_names_are_those_of_open_images_where_it_gave_them() -> None:
    assert named(("/m/01jfm_", "a1b2c3d4")) == ["m01jfm__a1b2c3d4.png"]
    assert named(("", "a1b2c3d4")) == ["m01g317_a1b2c3d4.png"]  # the class's own MID
    assert named(("traffic light", "17"), ("/m/04yx4", "")) == ["0.png", "1.png"]
    assert named(("/m/04yx4", "b"), ("/m/04yx4", "b"), ("/m/04yx4", "c")) == ["0.png", "1.png", "m04yx4_c.png"]


@pytest.mark.parametrize("label", ["/m/../../x", "../../etc/passwd", "/m/a\0b", "/m/a\n", "/m/" + 300 * "a", "//m/x"])
def test_no_name_leaves_the_folder(label: str) -> None:
    assert named((label, "b0")) == ["0.png"]
    assert named(("/m/04yx4", label)) == ["0.png"]


def test_an_unknown_image_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data", {"train": [sample(0)]})
    assert main([str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--extract", "../../x"]) == 2
    error = capsys.readouterr().err
    assert "there is no sample '../../x'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def rle_of(**values: object) -> Callable[[dict[str, Any]], Any]:
    return lambda value: value["annotations"][0]["segmentation"].update(values)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (rle_of(counts="PPPP1"), "the RLE has runs of "),
        (rle_of(counts="é"), "the RLE cannot be decoded"),
        (rle_of(size=[-1, 5]), "the RLE is of 5x-1, the image 48x32"),
        (rle_of(size=[100_000, 100_000]), "the RLE is of 100000x100000, the image 48x32"),
        (rle_of(size=[48, 32]), "the RLE is of 32x48, the image 48x32"),
        (lambda v: v.update(width=0, height=0), ".jpg is 48x32, 0000000000000001.json says 0x0"),
        (lambda v: v["annotations"][1].update(bbox=[float("nan")] * 4), "is not of numbers"),
        (lambda v: v["annotations"][1].update(category_id=7), "category_id 7 is not the id of a class"),
        (lambda v: v.update(title="\ud800"), "surrogates not allowed"),
        (lambda v: v["annotations"][0].update(predicted_iou=float("inf")), "predicted_iou inf is not from 0 to 1"),
    ],
)
def test_a_sample_with_a_fault_is_neither_drawn_nor_extracted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[dict[str, Any]], Any], told: str
) -> None:
    key = write_spoilt(tmp_path / "data", edit)
    out = tmp_path / "out"
    for more in (["--extract", key, "--out", str(out)], ["--html", str(out)]):
        assert main([str(tmp_path / "data"), *more]) == 2
        error = capsys.readouterr().err
        assert f"train/000000.tar: sample {key}: " in error
        assert told in error
        assert error.count("\n") == 1
    assert not out.exists()


def test_to_and_from_a_bucket(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    write_dataset(f"s3://{bucket}/data", {"train": [sample(0)]})
    assert main([f"s3://{bucket}/data", "--out", f"s3://{bucket}/out", "--extract", sample(0).image_id]) == 0
    names = [path.rsplit("/", 1)[-1] for path in s3.filesystem().ls(f"{bucket}/out")]
    assert f"{sample(0).image_id}.jpg" in names
    assert json.loads(s3.filesystem().cat_file(f"{bucket}/out/{sample(0).image_id}.json"))["author"] == "Zoë & <Søn>"
