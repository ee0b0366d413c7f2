"""A dataset with PNGs, through everything that reads samples."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards.common.errors import DatasetError, SampleError
from shards.export.cli import main as export
from shards.format.dataset import Dataset, DatasetInfo, open_dataset
from shards.format.dataset_writer import DatasetWriter
from shards.format.sample import Sample
from shards.inspect.cli import main as inspect
from shards.stream.streams import EvalStream
from tests.builder.builds import samples_of
from tests.support import edit_info, jpeg
from trainer.data.collate import EvalCollate

MASK = np.zeros((32, 48), np.bool_)
MASK[4:20, 6:30] = True
MODES = ("RGB", "L", "P", "RGBA", "I;16")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A JPEG, and a PNG of each mode; they are added as bytes, as paths and as strings."""
    root = tmp_path_factory.mktemp("png")
    with DatasetWriter(root / "data", ["cat"]) as writer:
        writer.add_image("photo", jpeg(48, 32, 0), [{"category": "cat", "mask": MASK}])
        for number, mode in enumerate(MODES):
            ramp = np.arange(32 * 48).reshape(32, 48)
            image = Image.fromarray(ramp.astype(np.uint16) * 40 if mode == "I;16" else ramp.astype(np.uint8))
            image = image if image.mode == mode else image.convert(mode)
            image.save(path := root / f"{number}.png")
            given = (path, str(path), path.read_bytes())[number % 3]
            writer.add_image(f"png{number}", given, [{"category": "cat", "mask": MASK}])
    return open_dataset(root / "data")


def stored(dataset: Dataset) -> dict[str, Sample]:
    return samples_of(Path(dataset.root.path))["train"]


def test_samples_are_read_decoded_and_verified(pictures: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect([str(pictures.root), "--verify"]) == 0
    assert inspect([str(pictures.root)]) == 0
    read = [one for batch in EvalStream(pictures, "train", batch_size=2) for one in batch]
    collated = EvalStream(pictures, "train", batch_size=2, collate=EvalCollate(2))
    images = [image for batch in collated for image in batch.images]
    assert {one.image_id: one.file_name for one in read} == {k: s.file_name for k, s in stored(pictures).items()}
    for sample, image in zip(read, images, strict=True):
        assert np.array_equal(np.asarray(sample.picture()), image.permute(1, 2, 0).numpy())
        assert (sample.masks()[0] == MASK).all()
    deep = next(one for one in read if one.image_id == "png4")
    assert np.array_equal(np.asarray(deep.picture())[..., 0], np.arange(32 * 48).reshape(32, 48) * 40 >> 8)


def test_pages_extraction_and_exports_have_the_png(pictures: Dataset, tmp_path: Path) -> None:
    assert inspect([str(pictures.root), "--html", str(tmp_path / "page.html")]) == 0
    assert inspect([str(pictures.root), "--extract", "png0", "--out", str(tmp_path / "one")]) == 0
    wanted = stored(pictures)["png0"].image
    assert (tmp_path / "one" / "png0.png").read_bytes() == wanted
    places = {"coco": "train/png0.png", "folder": "train/images/png0.png", "yolo": "images/train/png0.png"}
    for form, place in places.items():
        assert export([str(pictures.root), "--to", form, "--out", str(tmp_path / form)]) == 0
        assert (tmp_path / form / place).read_bytes() == wanted
    names = json.loads((tmp_path / "coco" / "annotations" / "instances_train.json").read_text())["images"]
    assert "png0.png" in {entry["file_name"] for entry in names}
    assert export([str(pictures.root), "--to", "rfdetr", "--out", str(tmp_path / "rfdetr")]) == 0
    with tarfile.open(tmp_path / "rfdetr" / "train-000000.tar") as tar:
        assert "png0.png" in tar.getnames()
    assert len(pictures.to_torchvision("train")) == 1 + len(MODES)


def test_webdataset_and_hugging_face_datasets_read_it(pictures: Dataset, tmp_path: Path) -> None:
    from datasets import load_dataset

    shard = str(next(Path(pictures.root.path).glob("train/*.tar")))
    decoded = {one["__key__"]: one for one in webdataset.WebDataset(shard, shardshuffle=False).decode("rgb8")}
    assert decoded["png0"]["png"].shape == decoded["photo"]["jpg"].shape == (32, 48, 3)
    for row in load_dataset(str(pictures.root), split="train", streaming=True):
        assert (row["png"] is None) == (row["__key__"] == "photo")
        assert (row["jpg"] or row["png"]).size == (48, 32)
        assert row["json"]["image_id"] == row["__key__"]


def test_only_what_needs_version_2_says_so(pictures: Dataset, tmp_path: Path) -> None:
    info = json.loads((pictures.root / "dataset.json").read())
    assert (info["version"], [shard["version"] for shard in info["shards"]]) == (2, [2])
    with DatasetWriter(tmp_path / "jpegs", ["cat"]) as writer:
        writer.add_image("photo", jpeg(48, 32, 0))
    first = json.loads((tmp_path / "jpegs" / "dataset.json").read_bytes())
    assert (first["version"], "version" in first["shards"][0]) == (1, False)
    for changed in ({**info, "version": 3}, {**info, "version": True}, {**info, "version": 1}):
        with pytest.raises(DatasetError, match=r"^x: (format )?[^\n]*version[^\n]*: (upgrade|build)[^\n]*$"):
            DatasetInfo.from_json(changed, "x")


def test_a_shard_that_understates_its_version_or_misnames_an_image_is_a_fault(
    pictures: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(pictures.root.path, root)

    def understate(info: dict[str, Any]) -> None:
        info["version"] = 1
        del info["shards"][0]["version"]

    edit_info(root, understate)
    assert inspect([str(root), "--verify"]) == 1
    assert "it needs format version 2, dataset.json says 1" in capsys.readouterr().out
    sample = stored(pictures)["png0"]
    for extension, data in (("jpg", sample.image), ("png", jpeg(48, 32, 0))):
        with pytest.raises(SampleError, match=f"a.{extension} is another kind of file"):
            Sample.from_members("a", {extension: data, "json": sample.to_members()["json"]})
