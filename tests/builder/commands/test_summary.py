import json
import re
import shutil
from pathlib import Path

import pytest

from builder.commands.build import Shortfall, Summary
from builder.commands.cli import main
from builder.commands.dry_run import SAMPLED
from builder.commands.summary import render_estimate, render_summary
from builder.planning.class_report import ClassReport
from builder.planning.plan_build import MIN_TRIED
from demo.scenes import SceneTruth
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import build, estimate, mirror, quotas, s3_mirror
from tests.builder.coco_scenes import CATEGORIES, document, write_coco
from tests.support import Proxied

SPLIT_FILES = {"train": "instances", "val": "val", "test": "test"}


def test_a_dry_run_predicts_the_build_and_writes_nothing(s3_scenes: SceneTruth, bucket: str, proxied: Proxied) -> None:
    source = s3_mirror()
    root, options = Location(f"s3://{bucket}/out"), quotas(("Person", "Car"), 8, 3, images_per_shard=4)
    with proxied() as proxy:
        found = estimate(source, options, root)
        assert not proxy.counters.requests["PUT"]
        before = len(proxy.requests)
        summary = build(source, options, root)
        packing = [seen for seen in proxy.requests[before:] if seen.method == "GET"]
    assert found.images == summary.handled == summary.samples <= SAMPLED
    assert found.shards == summary.shards
    assert list(found.counts) == list(summary.counts)
    assert found.jpegs == summary.images  # every length was in the sample
    assert found.masks == summary.masks
    assert found.output == pytest.approx(summary.nbytes, rel=0.25)
    assert found.masks_wanted <= found.masks.nbytes < found.whole_zips
    looks = 1 + 3 * MIN_TRIED  # one checks the access, and a few of each split whether they are there
    assert 0 <= sum(seen.key.endswith(".jpg") for seen in packing) - summary.images.requests <= looks
    assert found.whole_images is None
    assert found.whole_tables is not None
    for text in (render_estimate(found, "x"), render_summary(summary, "x")):
        assert f"{found.images} images in {found.shards} shards" in text
        assert "train  Person" in text
    assert "whole downloads" in render_estimate(found, "x")


def test_an_estimate_names_its_error(scenes: SceneTruth, tmp_path: Path) -> None:
    shutil.copytree(scenes.images, tmp_path / "images")
    for picture in sorted((tmp_path / "images" / "train").iterdir())[::4]:
        picture.unlink()
    found = estimate(mirror(scenes, tmp_path / "images"), quotas(("Person",), 1000, 0), Location(str(tmp_path / "out")))
    assert 0 < found.unavailable < found.sampled
    text = render_estimate(found, "out")
    assert f"from the lengths of {found.sampled} images, {found.unavailable} of them unavailable" in text
    assert not (tmp_path / "out").exists()


def test_a_split_without_an_image_has_rows_of_zeros_and_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_coco(tmp_path, images=4)
    (tmp_path / "val.json").write_text(json.dumps(document(annotations=[], categories=CATEGORIES)))
    (tmp_path / "test.json").write_text(json.dumps(document(categories=CATEGORIES)))  # of an image that is not there
    files = [f"{split}={tmp_path}/{name}.json" for split, name in SPLIT_FILES.items()]
    command = ["--source", "coco", "--images", str(tmp_path / "images"), "--annotations", *files, "--workers", "1"]
    for more in (["--dry-run"], []):
        main([*command, "--out", str(tmp_path / "out"), "--classes", "person", "car", *more])
        printed = re.sub(" +", " ", capsys.readouterr().out)
        assert "\nval person 0 0 0 0 0\nval car 0 0 0 0 0\n" in printed
        assert "\nval: no image: the source has no image of these classes for it\n" in printed
        assert ("\ntest: no image: none of its images could be packed\n" in printed) == (not more)
    assert "\ntest person 1 1 0 0 0\n" in printed


def test_predicted_masks_of_an_export_are_no_masks_of_the_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = write_coco(tmp_path, images=4)
    predicted = {"mask_source": "predicted", "mask_score": 0.9, "mask_run": "one"}
    annotations = [one | predicted | {"category_id": 1} for one in value["annotations"]]
    (tmp_path / "instances.json").write_text(json.dumps(value | {"annotations": annotations}))
    command = ["--source", "coco", "--images", f"{tmp_path}/images", "--annotations", f"{tmp_path}/instances.json"]
    for more in (["--dry-run"], []):
        main([*command, "--out", f"{tmp_path}/out", "--workers", "1", "--classes", "person", *more])
        printed = re.sub(" +", " ", capsys.readouterr().out)
        assert f"\ntrain person 4 4 4 0 {len(annotations)}\n" in printed
    dataset = open_dataset(tmp_path / "out")
    assert dataset.index("train").counts("predicted", dataset.categories)[1] > 0


@pytest.mark.parametrize(
    ("split", "masks", "boxes", "advised"),
    [
        ("train", 0, 9, 1),
        ("train", 3, 9, 1),
        ("train", 5, 9, 0),
        ("train", 20, 99, 0),
        ("train", 0, 0, 0),
        ("val", 0, 9, 0),
    ],
)
def test_a_report_says_once_how_classes_with_few_masks_learn_them(
    split: str, masks: int, boxes: int, advised: int
) -> None:
    chosen = tuple(ClassReport(split, name, 9, 9, masks, 9, masks, boxes) for name in ("Person", "Car"))
    text = render_summary(Summary(already_built=False, chosen=chosen), "x")
    assert (
        text.count("\nclasses with no or few masks learn them from boxes with --model.mask_head agnostic --loss")
        == advised
    )


def test_a_summary_counts_in_the_singular() -> None:
    text = render_summary(Summary(already_built=False, recovered=1, shards=1, samples=1, handled=1), "x")
    assert "1 image in 1 shard, " in text
    assert "recovered: 1 image or mask\n" in text
    assert "1 image in 0 s" in text


@pytest.mark.parametrize(
    ("reason", "recovered", "helps"),
    [("image-missing", None, True), ("image-refused", None, True), ("image-missing", 0, False)]
    + [(reason, None, False) for reason in ("image-undecodable", "image-too-large", "image-shape", "image-unknown")],
)
@pytest.mark.parametrize("built", [False, True])
def test_a_retry_is_recommended_only_where_it_can_help(
    reason: str, recovered: int | None, helps: bool, built: bool
) -> None:
    short = (Shortfall("train", "Person", 1, 2),)
    text = render_summary(
        Summary(already_built=built, failures=((reason, 1),), shortfalls=short, recovered=recovered), "x"
    )
    assert ("(try --retry-failed)" in text) == helps
    assert "short: train Person: 1 of 2 (" in text
