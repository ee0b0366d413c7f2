"""Failed images are replaced until quotas are met or no candidate is left; accounts add up whatever fails."""

import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.packing.executors import Engine
from builder.sources.openimages.source import OpenImages
from demo.scenes import SceneTruth
from shards.common.errors import UserError
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import Killed, accounts_of, build, count_steps, mirror, quotas, tree

CHOICE = quotas(("Person", "Car"), 6, 0, images_per_shard=4)


@pytest.fixture
def broken(scenes: SceneTruth, tmp_path: Path) -> OpenImages:
    """`scenes` with links to its images, which a test can replace."""
    shutil.copytree(scenes.images, tmp_path / "images", copy_function=os.symlink)
    return mirror(scenes, tmp_path / "images")


def test_failed_images_are_replaced_and_a_build_killed_in_any_round_resumes_to_the_same_bytes(
    broken: OpenImages, tmp_path: Path
) -> None:
    build(broken, CHOICE, Location(str(tmp_path / "whole")))
    for image_id in sorted(open_dataset(str(tmp_path / "whole")).table["image_id"].to_pylist())[:5]:
        (Path(broken.images.url) / "train" / f"{image_id}.jpg").unlink()
    summary = build(broken, CHOICE, Location(str(tmp_path / "out")), engine=Engine(2))
    assert (summary.shortfalls, summary.replaced > 0) == ((), True)
    assert all(entry.images >= 6 for entry in summary.counts)
    expected = tree(tmp_path / "out")
    steps = count_steps(partial(build, broken, CHOICE, Location(str(tmp_path / "counted"))))
    for kill_at in range(1, steps + 1):
        again = partial(build, broken, CHOICE, Location(str(tmp_path / f"killed-{kill_at}")))
        with pytest.raises(Killed):
            count_steps(again, kill_at)
        again()
        assert tree(tmp_path / f"killed-{kill_at}") == expected


@settings(max_examples=15)
@given(data=st.data())
def test_accounts_add_up_whatever_fails(
    data: st.DataObject, scenes: SceneTruth, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Requested = packed + failed for each reason, for images and masks; the index holds what was packed."""
    folder = tmp_path_factory.mktemp("sums")
    (folder / "images" / "train").mkdir(parents=True)
    for picture in (scenes.images / "train").iterdir():
        kind = data.draw(st.sampled_from(["good", "good", "good", "missing", "cut", "other"]))
        content = {"cut": picture.read_bytes()[:900], "other": b"<html>"}.get(kind, b"")
        if kind == "good":
            (folder / "images" / "train" / picture.name).symlink_to(picture)
        elif kind != "missing":
            (folder / "images" / "train" / picture.name).write_bytes(content)
    quota = data.draw(st.integers(1, 30))
    scope = quotas(("Person", "Traffic sign"), quota, 0, images_per_shard=data.draw(st.integers(1, 40)))
    try:
        summary = build(mirror(scenes, folder / "images"), scope, Location(str(folder / "out")))
    except UserError:  # all images failed
        return
    dataset = open_dataset(str(folder / "out"))
    rows = accounts_of(folder / "out")
    assert len({(row["kind"], row["image_id"], row["source"]) for row in rows}) == len(rows)
    status = Counter((row["kind"], row["status"]) for row in rows)
    assert status["image", "packed"] == len(dataset.table) == summary.samples
    assert status["mask", "packed"] == sum(map(sum, dataset.table["masks"].to_pylist()))
    reasons = Counter(row["status"] for row in rows if row["status"] != "packed")
    assert dict(summary.failures) == reasons
    lost = {row["image_id"] for row in rows if row["kind"] == "image" and row["status"] != "packed"}
    for row in rows:
        if row["kind"] == "mask":
            assert (row["status"] == "image-failed") == (row["image_id"] in lost)
