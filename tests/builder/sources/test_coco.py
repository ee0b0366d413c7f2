import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from builder.commands.cli import main
from builder.packing.inline_masks import encode_inline
from builder.sources.base import Filters
from builder.sources.coco import Coco, CocoSplit, parse_instances, parse_places, sample_key
from builder.sources.taxonomy import Taxonomy
from builder.tasks.plan import InlineMask, cut_tasks, make_plan
from shards.common.errors import UserError
from shards.format import rle
from shards.format.dataset import open_dataset
from shards.format.sample import KEY, Sample
from shards.storage.location import Location
from tests.builder.coco_scenes import write_coco
from tests.support import REPOSITORY


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, images=14, seed=1)
    write_coco(root, images=6, seed=2, name="val.json")
    return root


def run(scenes: Path, out: Path, *arguments: str, annotations: tuple[str, ...] = ("instances.json",)) -> int:
    places = [text if "=" not in text else text.replace("=", f"={scenes}/") for text in annotations]
    places = [place if "=" in place else str(scenes / place) for place in places]
    where = ["--source", "coco", "--images", str(scenes / "images"), "--annotations", *places, "--out", str(out)]
    return main([*where, "--workers", "1", "--images-per-shard", "5", *arguments])


def samples(out: Path) -> dict[str, dict[str, Sample]]:
    """Split -> key -> sample, by the standard library."""
    found: dict[str, dict[str, dict[str, bytes]]] = {}
    for path in sorted(out.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, extension = info.name.split(".")
                file = tar.extractfile(info)
                assert file is not None
                found.setdefault(path.parent.name, {}).setdefault(key, {})[extension] = file.read()
    return {
        split: {key: Sample.from_members(key, members) for key, members in keys.items()}
        for split, keys in found.items()
    }


def test_packed_masks_boxes_and_labels_are_those_of_pycocotools(scenes: Path, tmp_path: Path) -> None:
    assert run(scenes, tmp_path / "out") == 0
    coco = COCO(str(scenes / "instances.json"))
    packed = samples(tmp_path / "out")["train"]
    assert set(packed) == {f"{image_id:012d}" for image_id in coco.imgs}
    classes = {category.id: category.name for category in open_dataset(str(tmp_path / "out")).categories}
    assert list(classes.values()) == ["car", "dog", "person", "truck"]
    masks = crowds = 0
    for key, sample in packed.items():
        image = coco.imgs[int(key)]
        assert sample.image == (scenes / "images" / image["file_name"]).read_bytes()
        assert (sample.title, sample.original_url) == (image["file_name"], image["flickr_url"])
        assert sample.license == "http://creativecommons.org/licenses/by/2.0/"
        truth = {str(a["id"]): a for a in coco.imgToAnns[int(key)]}
        assert {instance.box_id for instance in sample.instances} == set(truth)
        for instance in sample.instances:
            expected = truth[instance.box_id]
            name = coco.cats[expected["category_id"]]["name"]
            assert classes[instance.category_id] == instance.label == name
            assert instance.bbox == pytest.approx(expected["bbox"], abs=1e-3)
            assert instance.is_group_of == bool(expected["iscrowd"])
            assert (instance.segmentation is not None) == ("segmentation" in expected)
            if instance.segmentation is not None:
                assert (rle.decode(instance.segmentation) == coco.annToMask(expected)).all()
                masks += 1
                crowds += instance.is_group_of
        here = {i.category_id for i in sample.instances}
        assert set(sample.verified_present) == here
        assert set(sample.verified_absent) == set(classes) - here
    assert masks > 15
    assert crowds > 2
    accounts = pq.read_table(tmp_path / "out" / "accounts.parquet").to_pylist()
    assert sum(row["kind"] == "mask" for row in accounts) == masks
    assert {row["status"] for row in accounts} == {"packed"}


def test_chosen_classes_supercategories_quotas_and_splits(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--classes", "vehicle", "person", "--per-class", "3", "--eval-per-class", "1")
    assert run(scenes, out, *arguments, annotations=("train=instances.json", "val=val.json")) == 0
    dataset = open_dataset(str(out))
    assert [category.name for category in dataset.categories] == ["vehicle", "person"]
    assert dataset.splits == ("train", "val")
    found = samples(out)
    assert all(key.startswith("train-") for key in found["train"])
    assert {i.label for s in found["train"].values() for i in s.instances} <= {"car", "truck", "person"}
    for split, quota in (("train", 3), ("val", 1)):
        for category in (1, 2):
            assert sum(any(i.category_id == category for i in s.instances) for s in found[split].values()) >= quota


def test_all_annotations_and_the_same_bytes_again(scenes: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert run(scenes, tmp_path / out, "--classes", "person", "--per-class", "4", "--all-annotations") == 0
    shards = [(tmp_path / out / "train" / "000000.tar").read_bytes() for out in ("a", "b")]
    assert shards[0] == shards[1]
    dataset = open_dataset(str(tmp_path / "a"))
    assert [category.name for category in dataset.categories] == ["person", "car", "dog", "truck"]
    coco = COCO(str(scenes / "instances.json"))
    for key, sample in samples(tmp_path / "a")["train"].items():
        assert len(sample.instances) == len(coco.imgToAnns[int(key)])


def test_a_partition_of_one_file_and_a_list_of_images(scenes: Path, tmp_path: Path) -> None:
    assert run(scenes, tmp_path / "parts", "--splits", "partition", "--partition", "0.5", "0.25", "0.25") == 0
    parts = samples(tmp_path / "parts")
    assert sum(map(len, parts.values())) == 14
    assert len(parts) > 1
    (tmp_path / "ids.txt").write_text("1\n000000000008\npart0/picture.1.2\nnowhere\n")
    code = run(scenes, tmp_path / "listed", "--images-list", str(tmp_path / "ids.txt"), "--classes", "dog")
    assert set(samples(tmp_path / "listed")["train"]) == {f"{n:012d}" for n in (1, 8, 15)}
    accounts = pq.read_table(tmp_path / "listed" / "accounts.parquet").to_pylist()
    assert [(a["image_id"], a["status"]) for a in accounts if a["image_id"] == "nowhere"] == [
        ("nowhere", "image-unknown")
    ]
    assert code in (0, 1, 3)


def document(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 8}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
        **changes,
    }


def opened(value: Any, filters: Filters | None = None, *classes: str) -> Any:
    path = Location("memory://coco-tests/instances.json")
    path.write(json.dumps(value).encode())
    source = Coco(Location("memory://coco-tests/images"), (("train", path),))
    chosen = source.taxonomy().choose(classes)
    return source.open_split("train", chosen, filters or Filters())


IMAGE = {"id": 1, "file_name": "a.jpg", "width": 10, "height": 8}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "no list 'images'"),
        ({}, "no list 'images'"),
        (document(annotations=None), "no list 'annotations'"),
        (document(categories=[3]), "no list 'categories'"),
        (document(images=[{"id": 1}]), r"images\[0\]: 'file_name'"),
        (document(images=[{**IMAGE, "id": True}]), "'id' is 'True'"),
        (document(images=[{**IMAGE, "id": 1.5}]), "'id' is '1.5'"),
        (document(images=[{**IMAGE, "width": "10"}]), "'width'"),
        (document(images=[{**IMAGE, "width": -10}]), "-10x8"),
        (document(images=[{**IMAGE, "height": 10**9}]), "10x1000000000"),
        (document(images=[IMAGE, IMAGE]), "are the same"),
        (document(images=[IMAGE, {**IMAGE, "id": "000000000001"}]), "are the same"),
        *[
            (document(images=[{**IMAGE, "file_name": name}]), "does not stay below")
            for name in ("/etc/passwd", "../a.jpg", "b/../../a.jpg", "b/..", "a\\b.jpg", "b//a.jpg", "a\n.jpg", "")
        ],
        (document(categories=[{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]), "another has it already"),
        (document(categories=[{"id": 1, "name": " "}]), "empty"),
        (document(annotations=[{"image_id": 1, "category_id": 9}]), "no category 9"),
        (document(annotations=[{"category_id": 1}]), "'image_id'"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_one_clear_line(value: Any, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        parse_instances(json.dumps(value).encode(), "x.json")
    assert str(caught.value).startswith("x.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"images": 1' + b"1" * 5000 + b"}"])
def test_no_json_is_one_clear_line(data: bytes) -> None:
    with pytest.raises(UserError, match=r"x\.json: not JSON"):
        parse_instances(data, "x.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
places = st.sampled_from(
    [
        *[("images", 0, key) for key in (*IMAGE, "license", "flickr_url", "neg_category_ids")],
        *[("annotations", 0, key) for key in ("id", "image_id", "category_id", "bbox", "segmentation", "iscrowd")],
        *[("categories", 0, key) for key in ("id", "name", "supercategory")],
        ("annotations", 0, "predicted_iou"),
        ("licenses", 0, "id"),
    ]
)


@given(st.lists(st.tuples(places, json_values), min_size=1, max_size=3))
def test_any_value_anywhere_is_read_or_told(changes: list[tuple[tuple[str, int, str], Any]]) -> None:
    value = json.loads(json.dumps(document(licenses=[{"id": 1, "url": "x"}])))
    for (table, row, key), new in changes:
        value[table][row][key] = new
    parsed = None
    with contextlib.suppress(UserError):
        parsed = parse_instances(json.dumps(value).encode(), "x.json")
    if parsed is None:
        return
    names = {name: name for name in parsed.names.values()}
    classes = Taxonomy(names, {}).choose([])
    split = CocoSplit(Location("memory://x"), parsed, classes, Filters(min_predicted_iou=0.5, drop=("group-of",)))
    split.candidates()
    plan = make_plan(classes.categories, cut_tasks("train", list(split.describe(parsed.images).values()), 4))
    for task in plan.tasks:
        for image in task.images:
            for planned in image.objects:
                if isinstance(planned.mask, InlineMask):
                    encode_inline(planned.mask, 10, 8)


def test_useless_annotations_are_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    good = document()["annotations"][0]
    bad = [
        {**good, "bbox": bbox}
        for bbox in ([1, 1, 0, 4], [1, 1, -3, 4], None, [1, 1], [1, 1, math.inf, 2], [10**400, 1, 1, 1])
    ]
    split = opened(document(annotations=[good, *bad, {**good, "image_id": 77}, {**good, "bbox": [20, 1, 4, 4]}]))
    [planned] = split.describe(["000000000001"])["000000000001"].objects
    assert planned.annotation.box == (0.1, 0.5, 0.125, 0.625)
    assert "7 annotations with neither a mask nor a box" in caplog.text
    assert "1 annotation of images that it does not list" in caplog.text


def test_filters_classes_and_what_is_known_to_be_absent() -> None:
    categories = [{"id": n, "name": name, "supercategory": "pet"} for n, name in ((1, "dog"), (2, "cat"), (3, "emu"))]
    annotation = {"image_id": 1, "bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 5, 1, 5, 5]]}
    annotations = [
        {**annotation, "id": 1, "category_id": 1, "predicted_iou": 0.4},
        {**annotation, "id": 2, "category_id": 2, "iscrowd": 1},
    ]
    value = document(categories=categories, annotations=annotations)
    split = opened(value, Filters(min_predicted_iou=0.5), "pet", "dog", "emu")
    image = split.describe(["000000000001"])["000000000001"]
    assert [(p.annotation.category_id, p.has_mask) for p in image.objects] == [(2, False), (1, True)]
    assert (image.verified_present, image.verified_absent) == ((1, 2), (3,))
    assert {c: (f.masked, f.boxed) for c, f in split.candidates().items()} == {
        1: (("000000000001",), ()),
        2: ((), ("000000000001",)),
        3: ((), ()),
    }
    dropped = opened(value, Filters(drop=("group-of",)), "cat")
    assert not len(dropped.candidates()[1])
    lvis = document(
        categories=categories,
        annotations=annotations,
        images=[{**IMAGE, "neg_category_ids": [3], "not_exhaustive_category_ids": [2]}],
    )
    image = opened(lvis, None, "dog", "cat", "emu").describe(["000000000001"])["000000000001"]
    assert (image.verified_present, image.verified_absent) == ((1,), (3,))


ids = st.integers() | st.text(max_size=80)


@given(ids, ids, st.sampled_from(["", "train-"]))
def test_keys_are_safe_and_differ(one: int | str, other: int | str, prefix: str) -> None:
    keys = [sample_key(image_id, prefix) for image_id in (one, other)]
    assert all(KEY.fullmatch(key) for key in keys)
    texts = [f"{i:012d}" if isinstance(i, int) else i for i in (one, other)]
    assert (keys[0] == keys[1]) == (texts[0] == texts[1])


def test_keys_are_the_same_for_ever() -> None:
    assert sample_key(139) == "000000000139"
    assert sample_key("0001eeaf4aed83f9") == "0001eeaf4aed83f9"
    assert sample_key("a/b.c", "val-") == "val-a_b_c-155b629f1b6f"


def test_places_are_one_file_or_one_a_split() -> None:
    assert parse_places(["https://x/i.json?sig=a=b"]) == ((("train", "https://x/i.json?sig=a=b"),), False)
    assert parse_places(["train=a", "val=b"]) == ((("train", "a"), ("val", "b")), True)
    for wrong in (["a", "b"], ["train=a", "train=b"], ["train=a", "dev=b"]):
        with pytest.raises(UserError, match="train=URL"):
            parse_places(wrong)


def test_faults_of_files_and_masks_go_to_the_accounts(scenes: Path, tmp_path: Path) -> None:
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    value = json.loads((root / "instances.json").read_text())
    gone, small = value["images"][0], value["images"][1]
    (root / "images" / gone["file_name"]).unlink()
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((5, 50, 3), np.uint8)).save(buffer, "JPEG")
    (root / "images" / small["file_name"]).write_bytes(buffer.getvalue())
    for annotation in value["annotations"]:
        if annotation["image_id"] == small["id"]:
            annotation["segmentation"] = [[1, 1, 9, 1, 9, 9]]
        elif annotation["image_id"] == value["images"][2]["id"]:
            annotation["segmentation"] = {"size": [1, 1], "counts": "bad"}
    (root / "instances.json").write_text(json.dumps(value))
    run(root, tmp_path / "out")
    accounts = pq.read_table(tmp_path / "out" / "accounts.parquet").to_pylist()
    found = {(a["kind"], int(a["image_id"]), a["status"]) for a in accounts if a["status"] != "packed"}
    assert ("image", gone["id"], "image-missing") in found
    assert ("mask", small["id"], "mask-shape") in found
    assert ("mask", value["images"][2]["id"], "mask-undecodable") in found
    assert len({(a["kind"], a["source"]) for a in accounts}) == len(accounts)


def test_the_command_alone(scenes: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "builder.commands.cli", "--source", "coco", "--images", str(scenes / "images")]
    command += ["--annotations", str(scenes / "instances.json"), "--classes", "person", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert "COCO" in (tmp_path / "out" / "README.md").read_text()
    wrong = subprocess.run([*command[:4], "coco"], capture_output=True, text=True, cwd=REPOSITORY)
    assert wrong.returncode == 2
