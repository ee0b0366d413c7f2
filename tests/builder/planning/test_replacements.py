"""Failed images are replaced until quotas are met or no candidate is left; accounts add up whatever fails."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.packing.executors import Engine
from builder.planning.replacements import next_round
from builder.planning.selection import select_images
from builder.sources.openimages.layout import source_location
from builder.sources.openimages.source import OpenImages
from builder.tasks.candidates import Candidates
from builder.tasks.plan import Metadata, PlannedImage, ShardTask, cut_tasks
from demo.scenes import SceneTruth
from shards.common.errors import UserError
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import build, quotas

CHOICE = quotas(("Person", "Car"), 6, 0, images_per_shard=4)


def planned(image_id: str) -> PlannedImage:
    return PlannedImage(image_id, f"x/{image_id}.jpg", (), (), (), Metadata())


class Reserve:
    """The rules of `builder.planning.prepare` for plain candidates."""

    def __init__(self, candidates: dict[int, Candidates], quota: int) -> None:
        self.candidates, self.quota, self.failed = candidates, quota, set[str]()
        self.chosen = set(select_images(candidates, quota, 0))

    def replacements(self, split: str, failed: Collection[str]) -> list[PlannedImage]:
        self.failed |= set(failed)
        good = self.chosen - self.failed
        fresh = select_images(self.candidates, self.quota, 0, taken=good, barred=self.failed)
        self.chosen.update(fresh)
        return [planned(image_id) for image_id in fresh]


image_ids = st.sets(st.integers(0, 30).map(lambda n: f"{n:04x}"), max_size=20)


@given(st.dictionaries(st.integers(1, 3), image_ids, min_size=1), st.integers(1, 8), image_ids, st.integers(1, 5))
def test_rounds_end_with_quotas_met_or_no_candidates_left(
    classes: dict[int, set[str]], quota: int, bad: set[str], per_shard: int
) -> None:
    candidates = {category: Candidates(tuple(sorted(images))) for category, images in classes.items()}
    reserve = Reserve(candidates, quota)
    tasks: list[ShardTask] = cut_tasks("train", [planned(i) for i in sorted(reserve.chosen)], per_shard)

    def asked() -> list[str]:
        return [image.image_id for task in tasks for image in task.images]

    while fresh := next_round(reserve.replacements, tasks, lambda _: bad & set(asked()), per_shard):
        tasks += fresh
    assert len(asked()) == len(set(asked()))
    assert [task.number for task in tasks] == list(range(len(tasks)))
    for images in classes.values():
        good = images - bad
        assert len(good & set(asked())) >= min(quota, len(good))


@pytest.fixture
def broken(scenes: SceneTruth, tmp_path: Path) -> OpenImages:
    """`scenes` with links to its images, which a test can replace."""
    (tmp_path / "images").mkdir()
    for folder in scenes.images.iterdir():
        (tmp_path / "images" / folder.name).mkdir()
        for picture in folder.iterdir():
            (tmp_path / "images" / folder.name / picture.name).symlink_to(picture)
    return OpenImages(source_location(str(tmp_path / "images")), source_location(str(scenes.annotations)))


def packed(root: Path) -> set[str]:
    return set(open_dataset(str(root)).table["image_id"].to_pylist())


def test_failed_images_are_replaced_and_every_requested_image_is_accounted_for(
    broken: OpenImages, tmp_path: Path
) -> None:
    build(broken, CHOICE, Location(str(tmp_path / "whole")))
    first = sorted(packed(tmp_path / "whole"))
    lost = {first[0]: "image-missing", first[3]: "image-undecodable", first[4]: "image-undecodable"}
    pictures = Path(broken.images.url) / "train"
    for image_id, reason in lost.items():
        (pictures / f"{image_id}.jpg").unlink()
        if reason == "image-undecodable":
            (pictures / f"{image_id}.jpg").write_bytes(b"not a picture")
    summary = build(broken, CHOICE, Location(str(tmp_path / "out")))
    assert summary.shortfalls == ()
    assert summary.replaced > 0
    assert packed(tmp_path / "out") >= set(first) - set(lost)
    assert all(entry.images >= 6 for entry in summary.counts)
    accounts = pq.read_table(tmp_path / "out" / "accounts.parquet").to_pylist()
    images = {row["image_id"]: row["status"] for row in accounts if row["kind"] == "image"}
    assert {image_id: images[image_id] for image_id in lost} == lost
    assert {image_id for image_id, status in images.items() if status == "packed"} == packed(tmp_path / "out")
    again = tmp_path / "again"
    build(broken, CHOICE, Location(str(again)), engine=Engine(2))
    for file in (tmp_path / "out").rglob("*.*"):
        assert (again / file.relative_to(tmp_path / "out")).read_bytes() == file.read_bytes()


def test_a_build_killed_in_any_round_resumes_to_the_same_bytes(
    broken: OpenImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(broken, CHOICE, Location(str(tmp_path / "whole")))
    for image_id in sorted(packed(tmp_path / "whole"))[:5]:
        (Path(broken.images.url) / "train" / f"{image_id}.jpg").unlink()
    summary = build(broken, CHOICE, Location(str(tmp_path / "out")))
    expected = {f.relative_to(tmp_path / "out"): f.read_bytes() for f in (tmp_path / "out").rglob("*.*")}

    class Killed(BaseException):
        pass

    write = Location.write
    for kill_at in range(1, 2 * summary.shards + 5):  # plan, two files per task, accounts, card, index, dataset.json
        root = tmp_path / f"killed-{kill_at}"
        writes = 0

        def killing(self: Location, data: bytes, kill_at: int = kill_at) -> None:
            nonlocal writes
            writes += 1
            if writes == kill_at:
                raise Killed
            write(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(Location, "write", killing)
            with pytest.raises(Killed):
                build(broken, CHOICE, Location(str(root)))
        build(broken, CHOICE, Location(str(root)))
        assert {f.relative_to(root): f.read_bytes() for f in root.rglob("*.*")} == expected


def test_shards_of_a_killed_run_that_are_not_needed_are_removed(broken: OpenImages, tmp_path: Path) -> None:
    root = tmp_path / "out"
    build(broken, CHOICE, Location(str(tmp_path / "whole")))
    (root / "train").mkdir(parents=True)
    (root / "train" / "000099.tar").write_bytes(b"a shard of an earlier, killed run")
    build(broken, CHOICE, Location(str(root)))
    assert {path.name for path in root.rglob("*.tar")} == {path.name for path in (tmp_path / "whole").rglob("*.tar")}


def test_a_failure_without_a_replacement_is_a_shortfall(broken: OpenImages, tmp_path: Path) -> None:
    everything = quotas(("Person",), 1000, 0)
    victim = sorted((Path(broken.images.url) / "train").iterdir())[0]
    build(broken, everything, Location(str(tmp_path / "whole")))
    assert victim.stem in packed(tmp_path / "whole")
    victim.unlink()
    summary = build(broken, everything, Location(str(tmp_path / "out")))
    [short] = summary.shortfalls
    assert (short.split, short.name) == ("train", "Person")
    assert short.packed == short.wanted - 1


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
    source = OpenImages(source_location(str(folder / "images")), source_location(str(scenes.annotations)))
    quota = data.draw(st.integers(1, 30))
    choice = quotas(("Person", "Traffic sign"), quota, 0, images_per_shard=data.draw(st.integers(1, 40)))
    try:
        summary = build(source, choice, Location(str(folder / "out")))
    except UserError:  # all images failed
        return
    dataset = open_dataset(str(folder / "out"))
    rows = pq.read_table(folder / "out" / "accounts.parquet").to_pylist()
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
