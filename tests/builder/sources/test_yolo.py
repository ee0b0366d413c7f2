from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from builder.commands.cli import main
from shards.format import rle
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import samples_of
from tests.support import jpeg

WIDTH, HEIGHT = 80, 60
POLYGON = "0 0.1 0.1 0.5 0.1 0.5 0.75 0.1 0.75"  # pixels 8 to 40, 6 to 45
BOX = "1 0.5 0.5 0.25 0.5"
Capture = pytest.CaptureFixture[str]


def write(root: Path, layout: str = "images/{}", **changes: Any) -> Path:
    """Write three images in train, of which one has no label file and one an empty one, and one in val."""
    for split, names in {"train": ("a", "b", "sub/c"), "val": ("a",)}.items():
        for number, name in enumerate(names):
            image = root / layout.format(split) / f"{name}.jpg"
            label = Path(str(image).replace("/images", "/labels")).with_suffix(".txt")
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(jpeg(WIDTH, HEIGHT, number))
            if name != "b":
                label.write_text("" if name == "sub/c" else f"{POLYGON}\n{BOX}\n\n")
    value = {"train": layout.format("train"), "val": layout.format("val"), "names": {0: "cat", 1: "dog"}, **changes}
    (root / "data.yaml").write_text(yaml.safe_dump({key: one for key, one in value.items() if one is not None}))
    return root


def run(root: Path, *arguments: str) -> int:
    places = ["--annotations", str(root / "data.yaml"), "--out", str(root.parent / "out")]
    return main(["--source", "yolo", *places, "--workers", "1", *arguments])


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("images/{}", {"names": ["cat", "dog"]}),
        ("images/{}", {"path": ".", "train": ["images/train"], "val": "./images/val"}),
        ("{}/images", {"train": "../train/images", "val": "../val/images"}),  # as Roboflow writes them
    ],
)
def test_polygons_boxes_and_images_without_labels(tmp_path: Path, layout: str, changes: dict[str, Any]) -> None:
    root = write(tmp_path / "data", layout, **changes)
    assert run(root, "--keep-empty") == 0
    assert [category.name for category in open_dataset(tmp_path / "out").categories] == ["cat", "dog"]
    found = samples_of(tmp_path / "out")
    assert sorted(found) == ["train", "val"]
    assert sum(not sample.instances for sample in found["train"].values()) == 2
    for split in ("train", "val"):
        sample = found[split][f"{split}-a"]
        cat, dog = sample.instances
        wanted = np.zeros((HEIGHT, WIDTH), np.bool_)
        wanted[6:45, 8:40] = True
        assert cat.segmentation is not None
        assert (rle.decode(cat.segmentation) == wanted).all()
        assert (cat.bbox, cat.label) == ((8, 6, 32, 39), "cat")
        assert (dog.bbox, dog.label, dog.segmentation) == ((30, 15, 20, 30), "dog", None)
        assert (sample.verified_present, sample.verified_absent) == ((1, 2), ())
    command = (tmp_path / "out" / "README.md").read_text()
    assert "--source yolo" in command
    assert "--images " not in command


def test_a_list_of_images_and_another_root(tmp_path: Path) -> None:
    root = write(tmp_path / "data", train="train.txt", val=None)
    (root / "train.txt").write_text("./images/train/a.jpg\nimages/val/a.jpg\n")
    (root / "data.yaml").rename(tmp_path / "data.yaml")
    assert main(["--source", "yolo", "--annotations", str(tmp_path / "data.yaml"), "--list-classes"]) == 2
    places = ["--images", str(root), "--annotations", str(tmp_path / "data.yaml"), "--out", str(tmp_path / "out")]
    assert main(["--source", "yolo", *places, "--workers", "1"]) == 0
    samples = samples_of(tmp_path / "out")["train"]
    assert {sample.title for sample in samples.values()} == {"images/train/a.jpg", "images/val/a.jpg"}


def test_labels_and_masks_are_read_from_a_bucket(tmp_path: Path, bucket: str) -> None:
    root = write(tmp_path / "data")
    for split in ("train", "val"):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[6:45, 8:40] = 7
        (root / "masks" / split).mkdir(parents=True)
        Image.fromarray(mask).save(root / "masks" / split / "a.png")
    for path in (path for path in root.rglob("*.*") if path.is_file()):
        (Location(f"s3://{bucket}") / str(path.relative_to(root))).write(path.read_bytes())
    yolo = ["--source", "yolo", "--annotations", f"s3://{bucket}/data.yaml"]
    places = ["--images", f"s3://{bucket}/images/train", "--annotations", f"s3://{bucket}/masks/train"]
    for name, words in (("yolo", yolo), ("masks", ["--source", "masks", *places, "--class-name", "cat"])):
        assert main([*words, "--out", str(tmp_path / name), "--workers", "1"]) == 0
    [one, other] = (samples_of(tmp_path / name)["train"] for name in ("yolo", "masks"))
    assert one["train-a"].instances[0].segmentation == other["a"].instances[0].segmentation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_are_of_the_upright_picture(tmp_path: Path, orientation: int) -> None:
    root = write(tmp_path / "data", val=None)
    upright = Image.new("RGB", (WIDTH, HEIGHT))
    ImageDraw.Draw(upright).rectangle((8, 6, 39, 44), "white")
    turns = (None, 0, 3, 1, 5, 2, 6, 4)  # Transpose that makes a stored picture of the upright one
    turn = turns[orientation - 1]
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(root / "images/train/a.jpg", quality=95, subsampling=0, exif=exif)
    assert run(root) == 0
    sample = samples_of(tmp_path / "out")["train"]["a"]
    assert (sample.masks()[0] == (np.asarray(sample.picture())[..., 0] > 127)).all()
    assert sample.instances[0].bbox == rle.bounds(sample.instances[0].segmentation)  # type: ignore[arg-type]


def test_boxes_without_extent_are_counted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path / "data", val=None)
    labels = (f"\ufeff{BOX}", "0 0.5 0.5 0 0.2", "0 0.5 0.5 -0.01 0.2", "0 1.01 0.5 0.02 0.2")
    (root / "labels/train/a.txt").write_text("\n".join(labels), encoding="utf-8")
    assert run(root) == 0
    assert [instance.category_id for instance in samples_of(tmp_path / "out")["train"]["a"].instances] == [2]
    assert "3 boxes of train without any extent: left out" in caplog.text


@pytest.mark.parametrize(
    ("changes", "label", "message"),
    [
        ({"names": None}, "", "names is None: give a name for each class from 0"),
        ({"names": {1: "cat"}}, "", "give a name for each class from 0"),
        ({"names": ["cat", "cat"]}, "", "two classes are named 'cat'"),
        ({"train": None, "val": None}, "", "names no images: give train, val or test"),
        ({"train": "images/nowhere"}, "", "images/nowhere: there is no image in it, and"),
        ({"train": "/somewhere/images"}, "", "not under the dataset's folder"),
        ({"path": 3}, "", "path in data.yaml is 3"),
        ({"path": "nowhere"}, "", "nowhere: there is no such folder"),
        ({}, "2 0.5 0.5 0.1 0.1", "a.txt: line 1: class 2 is not one of 2 names from 0: correct it"),
        ({}, "0 0.5 0.5 0.1", "a.txt: line 1: has 3 numbers: a box has 4, a polygon 6 or more, in pairs"),
        ({}, "0 20 20 4 4", "has numbers that are not fractions of the image, 0 to 1"),
        ({}, "0 nan 0.5 0.1 0.1", "has numbers that are not fractions of the image, 0 to 1"),
        ({}, "cat 0.5 0.5 0.1 0.1", "is not a class and numbers"),
        ({"train": "photos"}, "photos", "labels must be in labels/"),
        ({"train": "list.txt"}, "list", "list.txt: there is no image in it, and"),
        ({"kpt_shape": [2, 2]}, "0 0.5 0.5 0.2 0.2 0.4 0.4 0.5 0.5", "has labels of key points (kpt_shape)"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, capsys: Capture, changes: dict[str, Any], label: str, message: str
) -> None:
    root = write(tmp_path / "data", **changes)
    if label == "photos":
        (root / "photos").mkdir()
        (root / "photos/a.jpg").write_bytes(jpeg(8, 8, 0))
    elif label == "list":
        (root / "list.txt").write_text("\n")
    elif label:
        (root / "labels/train/a.txt").write_text(label)
    assert run(root) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
