import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from builder.packing.executors import Engine
from builder.packing.images import check_jpeg
from builder.planning.selection import Quotas
from builder.sources.openimages.layout import source_location
from builder.sources.openimages.source import OpenImages
from demo.scenes import SceneTruth
from shards.common.errors import UserError
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import build, quotas
from tests.support import REPOSITORY

CLASSES = ("Person", "Car", "Traffic light", "Traffic sign")
CHOICE = quotas(CLASSES, 1000, 1000, images_per_shard=4)


def mirror(scenes: SceneTruth) -> OpenImages:
    return OpenImages(source_location(str(scenes.images)), source_location(str(scenes.annotations)))


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(scenes: SceneTruth, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unbroken") / "out"
    build(mirror(scenes), CHOICE, Location(str(root)))
    return root


def test_what_was_drawn_is_what_is_packed(scenes: SceneTruth, unbroken: Path) -> None:
    dataset = open_dataset(str(unbroken))
    assert [category.name for category in dataset.categories] == list(CLASSES)
    for split, source_split in (("val", "validation"), ("test", "test")):
        truth, index = scenes.splits[source_split], dataset.index(split)
        assert len(index) == len(truth.sizes)
        for row in range(len(index)):
            assert (index.width[row], index.height[row]) == truth.sizes[index.image_id(row)]
        groups = index.counts("groups", dataset.categories)
        assert sum(groups.values()) == truth.group_boxes
        assert sum(index.counts("masks", dataset.categories).values()) == sum(truth.masks.values())
        boxes = sum(index.counts("instances", dataset.categories).values())
        assert boxes == sum(truth.boxes.values()) + truth.group_boxes
    masks = dataset.index("train").counts("masks", dataset.categories)
    assert sum(masks.values()) == sum(scenes.splits["train"].masks.values())


def test_accounts_add_up(unbroken: Path) -> None:
    dataset = open_dataset(str(unbroken))
    accounts = pq.read_table(unbroken / "accounts.parquet").to_pylist()
    packed = Counter((row["split"], row["kind"]) for row in accounts if row["status"] == "packed")
    for split in dataset.splits:
        index = dataset.index(split)
        assert packed[split, "image"] == len(index)
        assert packed[split, "mask"] == sum(index.counts("masks", dataset.categories).values())


def test_a_finished_root_is_left_alone_and_another_plan_refused(scenes: SceneTruth, tmp_path: Path) -> None:
    root = Location(str(tmp_path / "out"))
    few = CHOICE | {"images": Quotas(3, 0)}
    assert not build(mirror(scenes), few, root).already_built
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


def test_shards_do_not_depend_on_workers(scenes: SceneTruth, unbroken: Path, tmp_path: Path) -> None:
    build(mirror(scenes), CHOICE, Location(str(tmp_path / "out")), engine=Engine(workers=4))
    assert tree(tmp_path / "out") == tree(unbroken)


def test_damaged_and_half_finished_work_is_done_again(scenes: SceneTruth, unbroken: Path, tmp_path: Path) -> None:
    """What a kill can leave: shards without records, records without shards, half files of others' making."""
    root = tmp_path / "out"
    started = killed_build(scenes, root, after_records=3)
    records = sorted((root / ".build").glob("train-*.json"))
    assert len(records) >= 3, started
    (root / "train" / f"{records[0].stem.removeprefix('train-')}.tar").unlink()
    records[1].write_bytes(records[1].read_bytes()[:-9])
    summary = build(mirror(scenes), CHOICE, Location(str(root)))
    assert 1 <= summary.resumed < summary.shards
    assert tree(root) == tree(unbroken)


@pytest.mark.parametrize(("after_records", "workers"), [(0, 1), (4, 2)])
def test_killed_and_run_again_gives_the_same_bytes(
    scenes: SceneTruth, unbroken: Path, tmp_path: Path, after_records: int, workers: int
) -> None:
    root = tmp_path / "out"
    killed_build(scenes, root, after_records, workers)
    assert not (root / "dataset.json").exists()
    with pytest.raises(UserError, match="unfinished dataset of another plan"):
        build(mirror(scenes), CHOICE | {"seed": 9}, Location(str(root)))
    build(mirror(scenes), CHOICE, Location(str(root)))
    assert tree(root) == tree(unbroken)


def killed_build(scenes: SceneTruth, root: Path, after_records: int, workers: int = 1) -> str:
    """Start the real command in another process and SIGKILL it once so many records lie in the root."""
    command = [sys.executable, "-m", "builder.commands.cli", "--per-class", "1000", "--eval-per-class", "1000"]
    command += ["--images-per-shard", "4", "--workers", str(workers), "--out", str(root)]
    command += ["--images", str(scenes.images), "--annotations", str(scenes.annotations)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (root / ".build" / "plan.json").exists() and len(list(root.glob(".build/*-*.json"))) >= after_records:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    _, errors = process.communicate()  # ends only when the workers, which share its stderr, have ended too
    assert process.returncode == -signal.SIGKILL, errors
    return errors


def test_ctrl_c_says_how_to_go_on_and_leaves_no_process(scenes: SceneTruth, tmp_path: Path) -> None:
    root = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "builder.commands.cli",
        "--per-class",
        "1000",
        "--images-per-shard",
        "1",
        "--workers",
        "2",
    ]
    command += ["--images", str(scenes.images), "--annotations", str(scenes.annotations), "--out", str(root)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(root.glob(".build/*-*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "same command" in errors.splitlines()[-1]


def test_partition_never_shares_an_image_and_takes_from_train_alone(scenes: SceneTruth, tmp_path: Path) -> None:
    choice = CHOICE | {"partition": (0.5, 0.3, 0.2)}
    build(mirror(scenes), choice, Location(str(tmp_path / "out")))
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.splits == ("train", "val", "test")
    ids = dataset.table["image_id"].to_pylist()
    assert len(ids) == len(set(ids))  # also checked by finish_dataset
    assert set(ids) <= set(scenes.splits["train"].image_ids)


def test_quotas_are_kept_and_no_evaluation_split_is_made_when_none_is_wanted(
    scenes: SceneTruth, tmp_path: Path
) -> None:
    choice = quotas(("Person",), 4, 0, images_per_shard=4)
    summary = build(mirror(scenes), choice, Location(str(tmp_path / "out")))
    assert open_dataset(str(tmp_path / "out")).splits == ("train",)
    assert summary.samples == 4
    [report] = summary.chosen
    assert (report.asked, report.chosen) == (4, 4)
    assert "val/" not in (tmp_path / "out" / "README.md").read_text().split("---")[1]


def test_images_that_are_all_missing_are_an_error_and_a_corrected_command_works(
    scenes: SceneTruth, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    wrong = replace(mirror(scenes), images=Location(str(tmp_path / "empty")))
    root = Location(str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"none of the chosen images.*image-missing.*--images"):
        build(wrong, CHOICE, root)
    build(mirror(scenes), CHOICE | {"images": Quotas(2, 0)}, root)


def test_classes_without_any_image_are_an_error(scenes: SceneTruth, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image of the requested splits"):
        build(mirror(scenes), CHOICE | {"class_names": ("Dog",)}, Location(str(tmp_path / "out")))


def test_hugging_face_reads_the_root_without_inferring(unbroken: Path, tmp_path: Path) -> None:
    from datasets import Image, load_dataset

    loaded = load_dataset(str(unbroken), cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded["train"].features["jpg"], Image)
    loaded = loaded.cast_column("jpg", Image(decode=False))  # decoding, it would turn pictures by EXIF orientation
    dataset = open_dataset(str(unbroken))
    assert {split: len(rows) for split, rows in loaded.items()} == {
        "train": len(dataset.index("train")),
        "validation": len(dataset.index("val")),
        "test": len(dataset.index("test")),
    }
    for row in loaded["train"]:
        assert check_jpeg(row["jpg"]["bytes"]) == (row["json"]["width"], row["json"]["height"])
        assert row["__key__"] == row["json"]["image_id"]
    annotations = [annotation for row in loaded["train"] for annotation in row["json"]["annotations"]]
    assert any(annotation["segmentation"] is None for annotation in annotations)
    assert any(annotation["segmentation"] is not None for annotation in annotations)
