"""A wrong root of images ends before anything is packed; a root that lacks some images does not."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from builder.commands.cli import main
from builder.commands.image_check import check_images
from builder.fetching.traffic import PROCESS
from builder.planning.image_list import ImageList
from builder.planning.plan_build import BuildScope, PlannedBuild
from builder.planning.selection import Quotas
from builder.sources.base import Source
from builder.sources.coco import Coco
from builder.sources.openimages.source import OpenImages
from builder.tasks.plan import Metadata, Plan, PlannedImage, cut_tasks
from demo.s3proxy import Fault
from demo.s3server import S3Server
from demo.scenes import SceneTruth
from shards.common.errors import UserError
from shards.storage.location import Location
from tests.builder.builds import build, estimate, mirror, quotas, tree
from tests.builder.commands.conftest import CLASSES
from tests.support import Proxied

NOWHERE = Location("/nowhere")


def planned(source: Source, images: Mapping[str, int], *, listed: bool = False) -> PlannedBuild:
    """Return a plan of images with the names `<split>/<number>.jpg`, without classes and objects."""
    tasks = []
    for split, count in images.items():
        found = [
            PlannedImage(f"{n}", (source.images / split / f"{n}.jpg").url, (), (), (), Metadata()) for n in range(count)
        ]
        tasks += cut_tasks(split, found, 100)
    scope = BuildScope((), ImageList("ids.txt") if listed else Quotas(9, 9))
    return PlannedBuild(Plan((), tuple(tasks), ""), (), (), scope, {})


def store(root: Path, split: str, numbers: range) -> None:
    (root / split).mkdir(exist_ok=True)
    for number in numbers:
        (root / split / f"{number}.jpg").write_bytes(b"")


@pytest.fixture
def source(tmp_path: Path) -> OpenImages:
    return OpenImages(Location(str(tmp_path)), NOWHERE)


def test_a_root_without_images_is_an_error_with_an_address_and_the_layout(source: OpenImages, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_images(source, planned(source, {"train": 400, "val": 20}))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: none of 276 images of train and val is there, such as {tmp_path}/train/")
    assert "the images must be at <root>/train/<ImageID>.jpg" in message
    assert "\n" not in message
    coco = Coco(source.images, (("train", NOWHERE),))
    with pytest.raises(UserError, match=r"none of 8 images of train is there.*at <root>/<file_name>"):
        check_images(coco, planned(coco, {"train": 8}))


def test_a_root_that_lacks_most_images_is_not_refused(source: OpenImages, tmp_path: Path) -> None:
    store(tmp_path, "train", range(0, 400, 20))
    store(tmp_path, "val", range(19, 20))
    check_images(source, planned(source, {"train": 400, "val": 20}))


def test_a_split_without_images_is_an_error_unless_it_is_tiny_or_was_packed_or_listed(
    source: OpenImages, tmp_path: Path
) -> None:
    store(tmp_path, "train", range(20))
    both = planned(source, {"train": 20, "val": 20})
    with pytest.raises(UserError, match=rf"none of 20 images of val is there, such as {tmp_path}/val/.*--eval-per-cla"):
        check_images(source, both)
    check_images(source, both, packed={"val"})
    check_images(source, planned(source, {"train": 20, "val": 7}))
    check_images(source, planned(source, {"train": 20, "val": 20}, listed=True))
    check_images(source, planned(source, {"val": 7}))
    shutil.rmtree(tmp_path / "train")
    check_images(source, both, packed={"train", "val"})
    for listed in (False, True):
        with pytest.raises(UserError, match=r"none of 12 images of train and val is there"):
            check_images(source, planned(source, {"train": 6, "val": 6}, listed=listed))


def test_roots_in_a_bucket_and_on_a_web_server_are_checked_without_the_bytes_of_images(
    s3: S3Server, bucket: str, proxied: Proxied
) -> None:
    s3.filesystem().pipe({f"{bucket}/photos/train/{number}.jpg": bytes(100_000) for number in range(9)})
    with proxied() as proxy:
        for root in (f"s3://{bucket}", f"{proxy.endpoint_url}/{bucket}"):
            right, wrong = (OpenImages(Location(f"{root}/{name}"), NOWHERE) for name in ("photos", "wrong"))
            proxy.faults = ()
            before = PROCESS.total.nbytes
            check_images(right, planned(right, {"train": 9}))
            assert PROCESS.total.nbytes == before
            with pytest.raises(UserError, match=rf"{root}/wrong: none of 9 images of train is there, such as "):
                check_images(wrong, planned(wrong, {"train": 9}))
            proxy.faults = (Fault("refuse"),)
            with pytest.raises(UserError, match=r"access was refused to 9 images of train, .*such as .*credentials"):
                check_images(right, planned(right, {"train": 9}))


def test_a_wrong_root_leaves_the_target_as_it_is_and_fails_a_dry_run(
    scenes: SceneTruth, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, out, empty = quotas(CLASSES, 6, 2), tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    build(mirror(scenes), options, Location(str(out)))
    before = tree(out)
    caplog.set_level(logging.INFO, "builder")
    caplog.clear()
    with pytest.raises(UserError, match="is there, such as"):
        build(mirror(scenes, empty), options, Location(str(out)), overwrite=True)
    assert tree(out) == before
    with pytest.raises(UserError, match="is there, such as"):
        build(mirror(scenes, empty), options, Location(str(tmp_path / "fresh")))
    assert not tree(tmp_path / "fresh")
    assert "packed" not in caplog.text
    assert "replacement" not in caplog.text
    with pytest.raises(UserError, match="is there, such as"):
        estimate(mirror(scenes, empty), options, Location(str(out)))


def test_a_wrong_root_is_one_line_and_exit_code_2(
    scenes: SceneTruth, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = str(scenes.images / "train")
    command = ["--per-class", "8", "--images", wrong, "--annotations", str(scenes.annotations), "--workers", "1"]
    for more in ([], ["--dry-run"]):
        assert main([*command, "--out", str(tmp_path / "out"), *more]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.splitlines()[-1].startswith(f"build-shards: error: {wrong}: none of ")
        assert f"such as {wrong}/train/" in printed.err


def test_a_build_that_has_packed_images_is_resumed_without_another_check(
    scenes: SceneTruth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, root = tmp_path / "images", Location(str(tmp_path / "out"))
    shutil.copytree(scenes.images, images)
    options = quotas(CLASSES, 100, 100, images_per_shard=4)
    with monkeypatch.context() as patch:
        patch.setattr("builder.commands.build.remove_strays", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(mirror(scenes, images), options, root)
    for path in images.glob("*/*.jpg"):
        path.unlink()
    assert build(mirror(scenes, images), options, root).resumed


@pytest.mark.parametrize("missing", [("train", "validation", "test"), ("train",)])
def test_tiny_rounds_end_after_a_few_images(
    scenes: SceneTruth, tmp_path: Path, missing: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Too few images for a verdict before the first round; the source has 40 of train."""
    shutil.copytree(scenes.images, tmp_path / "images")
    for split in missing:
        shutil.rmtree(tmp_path / "images" / split)
    source, options = mirror(scenes, tmp_path / "images"), quotas(("Person",), 1, 1)
    caplog.set_level(logging.INFO, "builder")
    if len(missing) == 3:
        with pytest.raises(
            UserError, match=r"none of the chosen images.*image-missing 9\).*such as .*/train/.*at <root>"
        ):
            build(source, options, Location(str(tmp_path / "out")))
        return
    summary = build(source, options, Location(str(tmp_path / "out")))
    assert summary.replaced == 7
    assert [short.split for short in summary.shortfalls] == ["train"]
    assert "no image of train could be packed, such as " in caplog.text
