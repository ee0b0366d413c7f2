import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from demo.scenes import SceneTruth
from shards.common.errors import UserError
from shards.format.dataset import open_dataset
from shards.format.image import image_size
from shards.storage.location import Location
from tests.builder.builds import accounts_of, build, mirror, quotas, retry_failed, tree
from tests.builder.commands.conftest import CLASSES, EVERYTHING


def test_build_packs_the_drawn_scenes(scenes: SceneTruth, unbroken: Path) -> None:
    dataset = open_dataset(str(unbroken))
    assert [category.name for category in dataset.categories] == list(CLASSES)
    for split, source_split in (("val", "validation"), ("test", "test")):
        truth, index = scenes.splits[source_split], dataset.index(split)
        assert len(index) == len(truth.sizes)
        for row in range(len(index)):
            assert (index.width[row], index.height[row]) == truth.sizes[index.image_id(row)]
        names = ("groups", "masks", "instances")
        groups, masks, instances = (sum(index.counts(name, dataset.categories).values()) for name in names)
        assert (groups, masks) == (truth.group_boxes, sum(truth.masks.values()))
        assert instances == sum(truth.boxes.values()) + truth.group_boxes
    of_class = dataset.index("train").counts("masks", dataset.categories)
    assert sum(of_class.values()) == sum(scenes.splits["train"].masks.values())
    packed = Counter((row["split"], row["kind"]) for row in accounts_of(unbroken) if row["status"] == "packed")
    for split in dataset.splits:
        index = dataset.index(split)
        assert packed[split, "image"] == len(index)
        assert packed[split, "mask"] == sum(index.counts("masks", dataset.categories).values())


def test_a_finished_root_is_unchanged_and_another_plan_is_refused(scenes: SceneTruth, tmp_path: Path) -> None:
    root = Location(str(tmp_path / "out"))
    few = EVERYTHING | quotas(CLASSES, 3, 0)
    assert not build(mirror(scenes), few, root).already_built
    assert open_dataset(tmp_path / "out").splits == ("train",)  # a quota of 0: no evaluation splits
    assert "val/" not in (tmp_path / "out" / "README.md").read_text().split("---")[1]
    before = tree(tmp_path)
    assert build(mirror(scenes), few, root).already_built
    other = few | {"seed": 1}
    with pytest.raises(UserError, match=r"finished dataset of another plan.*--overwrite"):
        build(mirror(scenes), other, root)
    assert tree(tmp_path) == before
    (tmp_path / "out" / "train" / "notes.txt").write_text("mine")
    build(mirror(scenes), other, root, overwrite=True)
    after = tree(tmp_path / "out")
    assert after.pop("train/notes.txt") == b"mine"
    build(mirror(scenes), other, Location(str(tmp_path / "fresh")))
    assert after == tree(tmp_path / "fresh")


def test_shards_that_vanish_are_noticed_while_packing_and_afterwards(
    scenes: SceneTruth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, folder = EVERYTHING | quotas(CLASSES, 3, 0), tmp_path / "out"
    root = Location(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr("builder.commands.build.remove_strays", lambda *_: shutil.rmtree(folder / "train"))
        with pytest.raises(UserError, match=r"gone or of another size, such as train/000000\.tar.*same command again"):
            build(mirror(scenes), few, root)
    assert not (folder / "dataset.json").exists()
    build(mirror(scenes), few, root)
    whole = tree(folder)
    shards = sorted((folder / "train").iterdir())
    shards[0].unlink()
    shards[1].write_bytes(b"short")
    for action in (build, retry_failed):
        with pytest.raises(UserError, match=rf"2 of {len(shards)} written shards gone.*--overwrite"):
            action(mirror(scenes), few, root)
    build(mirror(scenes), few, root, overwrite=True)
    assert tree(folder) == whole


def test_an_unfinished_build_is_resumed_and_its_damaged_files_are_replaced(
    scenes: SceneTruth, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("builder.commands.build.remove_strays", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(mirror(scenes), EVERYTHING, Location(str(root)))
    assert not (root / "dataset.json").exists()
    with pytest.raises(UserError, match="unfinished dataset of another plan"):
        build(mirror(scenes), EVERYTHING | {"seed": 9}, Location(str(root)))
    records = sorted((root / ".build").glob("train-*.json"))
    (root / "train" / f"{records[0].stem.removeprefix('train-')}.tar").unlink()
    records[1].write_bytes(records[1].read_bytes()[:-9])
    records[2].unlink()
    (root / "train" / "000003.tar.12.34.tmp").write_bytes(b"half")
    (root / "train" / "000099.tar").write_bytes(b"replacements that are no longer needed")
    summary = build(mirror(scenes), EVERYTHING, Location(str(root)))
    assert summary.resumed == summary.shards - 3
    assert tree(root) == tree(unbroken)


def test_a_build_without_any_image_is_an_error_and_can_be_corrected(scenes: SceneTruth, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wrong = replace(mirror(scenes), images=Location(str(tmp_path / "empty")))
    root = Location(str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"empty: none of 56 images of train, val and test is there, .*--images"):
        build(wrong, EVERYTHING, root)
    shutil.copytree(scenes.images, tmp_path / "pages")
    for path in (tmp_path / "pages").glob("*/*.jpg"):
        path.write_bytes(b"<html>")
    pages = replace(mirror(scenes), images=Location(str(tmp_path / "pages")))
    with pytest.raises(UserError, match=r"none of the chosen images.*image-undecodable.*--images .*<ImageID>.jpg"):
        build(pages, quotas(CLASSES, 4, 1), root)
    with pytest.raises(UserError, match="no image of the requested splits"):
        build(mirror(scenes), quotas(("Dog",), 1000, 1000), root)
    build(mirror(scenes), quotas(CLASSES, 2, 0), root)


def test_hugging_face_datasets_reads_the_root(unbroken: Path, tmp_path: Path) -> None:
    from datasets import Image, load_dataset

    loaded = load_dataset(str(unbroken), cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded["train"].features["jpg"], Image)
    loaded = loaded.cast_column("jpg", Image(decode=False))  # decoding would apply the EXIF orientation
    dataset = open_dataset(str(unbroken))
    names = {"train": "train", "val": "validation", "test": "test"}
    assert {split: len(rows) for split, rows in loaded.items()} == {
        name: len(dataset.index(split)) for split, name in names.items()
    }
    for row in loaded["train"]:
        assert image_size(row["jpg"]["bytes"]) == (row["json"]["width"], row["json"]["height"])
        assert row["__key__"] == row["json"]["image_id"]
    annotations = [annotation for row in loaded["train"] for annotation in row["json"]["annotations"]]
    assert {annotation["segmentation"] is None for annotation in annotations} == {True, False}
