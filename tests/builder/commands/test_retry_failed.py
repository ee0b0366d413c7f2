"""`--retry-failed`, also when it is killed at any write: the dataset is the old one or the new one."""

import shutil
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from builder.packing import pack
from builder.sources.openimages.layout import source_location
from builder.sources.openimages.source import OpenImages
from demo.scenes import SceneTruth
from shards.common.errors import DatasetError, UserError
from shards.format.accounts import RECOVERED
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import Killed, accounts_of, build, count_steps, quotas, retry_failed, tree

CHOICE = quotas(("Person", "Car"), 1000, 0, images_per_shard=8)


class World:
    """A mirror that tests can damage and repair; `damage` breaks two images and a mask of a third."""

    def __init__(self, scenes: SceneTruth, folder: Path) -> None:
        self.copies = ((scenes.images, folder / "images"), (scenes.annotations, folder / "annotations"))
        self.repair()
        images, annotations = (source_location(str(copy)) for _, copy in self.copies)
        self.source = OpenImages(images, annotations)

    def repair(self) -> None:
        for original, copy in self.copies:
            shutil.copytree(original, copy, dirs_exist_ok=True)

    def damage(self, whole: Path) -> dict[str, str]:
        """Break files, and return image id or name of a mask -> expected status."""
        accounts, images = accounts_of(whole), Path(self.source.images.url) / "train"
        ids = [row["image_id"] for row in accounts if row["kind"] == "image"]
        (images / f"{ids[1]}.jpg").unlink()
        (images / f"{ids[6]}.jpg").write_bytes(b"<html>")
        mask = next(row for row in accounts if row["kind"] == "mask" and row["image_id"] not in (ids[1], ids[6]))
        name, path = mask["source"], Path(self.source.mask_zip("train", mask["image_id"]).url)
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(name)
        data = bytearray(path.read_bytes())
        data[info.header_offset + 30 + len(name) + info.compress_size // 2] ^= 0xFF  # in the mask, not in the directory
        path.write_bytes(data)
        return {ids[1]: "image-missing", ids[6]: "image-undecodable", name: "mask-undecodable"}


@pytest.fixture
def world(scenes: SceneTruth, tmp_path: Path) -> World:
    return World(scenes, tmp_path)


def statuses(root: Path) -> dict[str, str]:
    return {row["image_id"] if row["kind"] == "image" else row["source"]: row["status"] for row in accounts_of(root)}


def test_recovered_files_are_added_and_other_bytes_are_unchanged(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(world.source, CHOICE, Location(str(tmp_path / "whole")))
    lost = world.damage(tmp_path / "whole")
    root = tmp_path / "out"
    with pytest.raises(UserError, match="not a shard dataset, or a build or fill that has not finished"):
        retry_failed(world.source, CHOICE, Location(str(root)))
    build(world.source, CHOICE, Location(str(root)))
    assert {name: statuses(root)[name] for name in lost} == lost
    before = tree(root)

    assert retry_failed(world.source, CHOICE, Location(str(root))).recovered == 0
    with pytest.raises(UserError, match="another plan"):
        retry_failed(world.source, quotas(("Person",), 3, 0), Location(str(root)))
    assert tree(root) == before

    world.repair()
    read_images = Mock(wraps=pack._read_images)
    monkeypatch.setattr(pack, "_read_images", read_images)
    summary = retry_failed(world.source, CHOICE, Location(str(root)))
    fetched = {image.image_id for call in read_images.call_args_list for image in call.args[0]}
    assert fetched == {name for name in lost if not name.endswith(".png")}
    assert (summary.recovered or 0) >= 3
    assert (summary.shortfalls, summary.failures) == ((), ())
    after, expected = tree(root), tree(tmp_path / "whole")
    assert after.keys() == expected.keys()
    assert all(after[name] == expected[name] for name in after if name.endswith((".tar", "index.parquet")))
    assert set(statuses(root).values()) == {"packed"}
    details = {row["detail"] for row in accounts_of(root)}
    assert details == {"", *(f"{RECOVERED}{status}" for status in {*lost.values(), "image-failed"})}
    same = [name for name in before if name.endswith(".tar") and before[name] == expected[name]]
    assert same  # some shards were not affected

    again = retry_failed(world.source, CHOICE, Location(str(root)))
    assert (again.recovered, again.handled) == (0, 0)
    assert tree(root) == after


def test_replacements_stay_when_the_replaced_images_are_recovered(world: World, tmp_path: Path) -> None:
    few = quotas(("Person", "Car"), 6, 0, images_per_shard=4)
    build(world.source, few, Location(str(tmp_path / "whole")))
    lost = world.damage(tmp_path / "whole")
    root = tmp_path / "out"
    assert build(world.source, few, Location(str(root))).replaced
    asked = statuses(root)
    world.repair()
    summary = retry_failed(world.source, few, Location(str(root)))
    assert summary.samples == sum(not name.endswith(".png") for name in asked)
    assert set(asked) == set(statuses(root))
    assert set(lost) <= {name for name, status in statuses(root).items() if status == "packed"}
    assert retry_failed(world.source, few, Location(str(root))).handled == 0
    assert build(world.source, few, Location(str(root))).already_built


def test_a_retry_killed_at_any_write_leaves_the_old_or_the_new_dataset(world: World, tmp_path: Path) -> None:
    build(world.source, CHOICE, Location(str(tmp_path / "whole")))
    world.damage(tmp_path / "whole")
    build(world.source, CHOICE, Location(str(tmp_path / "damaged")))
    world.repair()
    old = tree(tmp_path / "damaged")
    shutil.copytree(tmp_path / "damaged", tmp_path / "repaired")
    steps = count_steps(partial(retry_failed, world.source, CHOICE, Location(str(tmp_path / "repaired"))))
    new = tree(tmp_path / "repaired")
    built = set()
    for step in range(1, steps + 1):
        root, copy = tmp_path / f"retried-{step}", tmp_path / f"built-{step}"
        shutil.copytree(tmp_path / "damaged", root)
        with pytest.raises(Killed):
            count_steps(partial(retry_failed, world.source, CHOICE, Location(str(root))), kill_at=step)
        assert readable(root, old, new)
        shutil.copytree(root, copy)
        retry_failed(world.source, CHOICE, Location(str(root)))
        assert tree(root) == new
        build(world.source, CHOICE, Location(str(copy)))
        built.add(tree(copy) == new)
        assert tree(copy) in (old, new)
    assert built == {True, False}


def readable(root: Path, old: dict[str, bytes], new: dict[str, bytes]) -> bool:
    """Return whether a reader sees the old dataset, the new one or an unfinished one, but not a mix."""
    try:
        dataset = open_dataset(str(root))
    except DatasetError as error:
        return "has not finished" in str(error)
    files = tree(root)
    shards = [shard.path for shard in dataset.info.shards] + ["index.parquet", "dataset.json"]
    return any(all(files[path] == version[path] for path in shards) for version in (old, new))
