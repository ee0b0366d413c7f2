"""The drawn scenes and their files have the properties of Open Images that the builder relies on."""

import csv
import io
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.scenes import SceneConfig, SceneTruth, draw_scene, image_id, main, scene_of, write_open_images
from demo.street import MIDS, MIN_VISIBLE
from shards.common.class_hierarchy import parse_hierarchy

CONFIG = SceneConfig(train=40, validation=10, test=6, seed=1)  # of the fixture `scenes`
SPLITS = ("train", "validation", "test")
SIDES = ("XMin", "YMin", "XMax", "YMax")
# The tables of a split and their columns.
BOXES, MASKS = "v5/{split}-annotations-bbox.csv", "v5/{split}-annotations-object-segmentation.csv"
LABELS = "v5/{split}-annotations-human-imagelabels-boxable.csv"
METADATA = "2018_04/{split}/{split}-images-with-rotation.csv"
COLUMNS = {
    BOXES: "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,"
    "IsInside",
    MASKS: "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks",
    LABELS: "ImageID,Source,LabelName,Confidence",
    METADATA: "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,"
    "OriginalMD5,Thumbnail300KURL,Rotation",
}
# Those of train have other names, and its boxes more columns.
OF_TRAIN = {
    BOXES: "v6/oidv6-train-annotations-bbox.csv",
    METADATA: "2018_04/train/train-images-boxable-with-rotation.csv",
}
CLICKS = ",XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"


def table(scenes: SceneTruth, name: str, split: str) -> list[dict[str, str]]:
    path = OF_TRAIN.get(name, name) if split == "train" else name
    with (scenes.annotations / path.format(split=split)).open(newline="") as file:
        return list(csv.DictReader(file))


def masks(scenes: SceneTruth, split: str) -> dict[str, Image.Image]:
    found: dict[str, Image.Image] = {}
    for digit in "0123456789abcdef":
        with zipfile.ZipFile(scenes.annotations / f"v5/{split}-masks/{split}-masks-{digit}.zip") as archive:
            found |= {name: Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist()}
            assert {name[0] for name in archive.namelist()} <= {digit}
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_tables_have_the_columns_of_open_images(scenes: SceneTruth, split: str) -> None:
    for name, columns in COLUMNS.items():
        found = ",".join(table(scenes, name, split)[0])
        assert found == columns + (CLICKS if split == "train" and name == BOXES else ""), name
    assert {row["ImageID"] for row in table(scenes, METADATA, split)} == set(scenes.splits[split].image_ids)


def test_class_files_and_hierarchy(scenes: SceneTruth) -> None:
    with (scenes.annotations / "v5" / "class-descriptions-boxable.csv").open(newline="") as file:
        described: dict[str, str] = dict(csv.reader(file))
    assert {name: mid for mid, name in described.items()}.items() >= MIDS.items()
    segmentable = (scenes.annotations / "v5" / "classes-segmentation.txt").read_text().split()
    assert set(MIDS.values()) <= set(segmentable) <= set(described)
    nodes = parse_hierarchy((scenes.annotations / "2018_04/bbox_labels_600_hierarchy.json").read_text(), "tree")
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for node in nodes:
        if node.ancestors:
            kinds[described.get(node.ancestors[-1], "Entity")].add(described[node.label])
    assert nodes[0].label == "/m/0bl9f"
    assert kinds["Person"] == {"Man", "Woman", "Boy", "Girl"}
    assert kinds["Car"] == {"Limousine", "Van"}
    assert kinds["Traffic sign"] == {"Stop sign"}
    assert "Car" in kinds["Land vehicle"]


def test_mask_and_box_tables_of_train_differ(scenes: SceneTruth) -> None:
    """Some boxes have no mask, and coordinates are formatted differently."""
    boxes, masks = table(scenes, BOXES, "train"), table(scenes, MASKS, "train")
    assert 0.55 < len(masks) / sum(row["IsGroupOf"] == "0" for row in boxes) < 0.85
    box_texts = {row[side] for row in boxes for side in SIDES}
    texts = [row[f"Box{side}"] for row in masks for side in SIDES]
    assert sum(text not in box_texts for text in texts) > len(texts) / 4
    assert any(len(text) > 15 for text in texts)


@pytest.mark.parametrize("split", SPLITS)
def test_masks_resized_to_the_image_are_the_drawn_objects(scenes: SceneTruth, split: str) -> None:
    members, rows, truth = masks(scenes, split), table(scenes, MASKS, split), scenes.splits[split]
    assert sorted(members) == sorted(row["MaskPath"] for row in rows)
    drawn = {name: scene_of(CONFIG, split, index) for index, name in enumerate(truth.image_ids)}
    other_size = 0
    for row in rows:
        mask, size = members[row["MaskPath"]], truth.sizes[row["ImageID"]]
        assert row["MaskPath"] == f"{row['ImageID']}_{row['LabelName'].replace('/', '')}_{row['BoxID']}.png"
        assert mask.mode == "1"
        other_size += mask.size != size
        resized = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
        box = np.array([float(row[f"Box{side}"]) for side in SIDES])
        nearest = min(
            (thing for thing in drawn[row["ImageID"]].objects if thing.label_mid == row["LabelName"]),
            key=lambda thing: np.abs(np.array(thing.box) / np.array(size * 2) - box).max(),
        )
        if mask.width >= size[0]:
            assert np.array_equal(resized, nearest.mask)
        else:
            assert (resized & nearest.mask).sum() / (resized | nearest.mask).sum() > 0.7
    assert other_size > 0.6 * len(rows)


@pytest.mark.parametrize("split", SPLITS)
def test_jpegs_decode_at_the_stated_size_to_the_drawn_picture(scenes: SceneTruth, split: str) -> None:
    truth = scenes.splits[split]
    assert {path.stem for path in (scenes.images / split).iterdir()} == set(truth.image_ids)
    for index, (name, size) in enumerate(truth.sizes.items()):
        assert name == image_id(CONFIG, split, index)
        decoded = Image.open(scenes.images / split / f"{name}.jpg")
        drawn = Image.fromarray(scene_of(CONFIG, split, index).image)
        assert (decoded.format, decoded.mode, decoded.size, drawn.size) == ("JPEG", "RGB", size, size)
        # Reduced, because JPEG removes most of the noise.
        difference = np.asarray(decoded.reduce(8), int) - np.asarray(drawn.reduce(8), int)
        assert np.abs(difference).mean() < 1.5


def test_verified_labels_agree_with_the_boxes(scenes: SceneTruth) -> None:
    def labels_of(rows: Iterable[dict[str, str]]) -> dict[str, set[str]]:
        found: defaultdict[str, set[str]] = defaultdict(set)
        for row in rows:
            found[row["ImageID"]].add(row["LabelName"])
        return found

    verified = table(scenes, LABELS, "train")
    present, absent = (labels_of(row for row in verified if row["Confidence"] == known) for known in "10")
    boxed = labels_of(table(scenes, BOXES, "train"))
    assert present == boxed
    kinds = {"/m/01g317": {"Man", "Woman", "Boy", "Girl"}, "/m/0k4j": {"Van", "Limousine"}, "/m/01mqdt": {"Stop sign"}}
    for name, labels in absent.items():
        assert not labels & boxed.get(name, set())
        for parent in kinds.keys() & labels:
            assert not {MIDS[child] for child in kinds[parent]} & boxed.get(name, set())
    unknown = [set(MIDS.values()) - present.get(name, set()) - absent[name] for name in absent]
    assert sum(map(bool, unknown)) > len(unknown) / 2


def test_rotation_is_metadata_only_and_rarely_not_zero(scenes: SceneTruth) -> None:
    rows = table(scenes, METADATA, "train")
    rotations = Counter(row["Rotation"] for row in rows)
    assert set(rotations) <= {"0.0", "90.0", "180.0", "270.0"}
    assert 0 < rotations.total() - rotations["0.0"] < 8
    assert all(row["Author"] and row["License"].startswith("https://creativecommons.org/") for row in rows)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    config = SceneConfig(train=18, validation=3, test=2, seed=5)
    for name, processes in (("one", 1), ("two", 2)):
        write_open_images(tmp_path / name, config, processes)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    write_open_images(tmp_path / "other", SceneConfig(train=18, validation=3, test=2, seed=6))
    assert files(tmp_path / "one") != files(tmp_path / "other")


def test_more_images_do_not_change_the_first_ones(tmp_path: Path) -> None:
    few = write_open_images(tmp_path / "few", SceneConfig(train=3, validation=0, test=0))
    more = write_open_images(tmp_path / "more", SceneConfig(train=6, validation=0, test=0))
    assert more.splits["train"].image_ids[:3] == few.splits["train"].image_ids
    assert files(few.images).items() <= files(more.images).items()


@pytest.mark.parametrize(("width", "height"), [(256, 192), (144, 192), (96, 64), (640, 427)])
def test_objects_are_visible_disjoint_and_tightly_boxed(width: int, height: int) -> None:
    for seed in range(12):
        scene = draw_scene(np.random.default_rng(seed), width, height, group_fraction=0.5)
        assert (scene.image.shape, scene.image.dtype.name) == ((height, width, 3), "uint8")
        stack = np.array([thing.mask for thing in scene.objects]).reshape(-1, height, width)
        assert stack.sum(axis=0).max(initial=0) <= 1
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            inside = thing.mask[top:bottom, left:right]
            assert thing.mask.sum() == inside.sum() >= MIN_VISIBLE
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()  # noqa: PT018
            assert thing.name == "Person" or not thing.is_group_of


def test_wrong_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="unmasked_fraction is 2"):
        SceneConfig(unmasked_fraction=2)
    with pytest.raises(ValueError, match="no split 'val'"):
        scene_of(CONFIG, "val", 0)
    assert main(["--out", str(tmp_path), "--train", "-1"]) == 1
    assert "train is -1" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--train", "2", "--validation", "1", "--test", "0"]) == 0
    assert "train: 2 images" in capsys.readouterr().out
