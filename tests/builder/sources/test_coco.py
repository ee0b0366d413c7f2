import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pycocotools.coco import COCO

from builder.commands.cli import main
from builder.sources.base import Candidates, Filters
from builder.sources.coco import Coco
from builder.sources.listing import ListedSplit, parse_places
from shards.common.errors import UserError
from shards.format import rle
from shards.format.dataset import open_dataset
from shards.format.sample import MaskPrediction
from shards.inspect.cli import main as inspect
from shards.storage.location import Location
from tests.builder.builds import accounts_of, samples_of
from tests.builder.coco_scenes import IMAGE, document, write_coco
from tests.support import jpeg

NO_FILTERS = Filters()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, images=14, seed=1)
    write_coco(root, images=6, seed=2, name="val.json")
    return root


def run(scenes: Path, out: Path, *arguments: str, annotations: tuple[str, ...] = ("instances.json",)) -> int:
    places = [text.replace("=", f"={scenes}/") if "=" in text else str(scenes / text) for text in annotations]
    where = ["--source", "coco", "--images", str(scenes / "images"), "--annotations", *places, "--out", str(out)]
    return main([*where, "--workers", "1", "--images-per-shard", "5", *arguments])


def test_packed_masks_boxes_and_labels_are_those_of_pycocotools(scenes: Path, tmp_path: Path) -> None:
    assert run(scenes, tmp_path) == 0
    assert "COCO" in (tmp_path / "README.md").read_text()
    coco = COCO(str(scenes / "instances.json"))
    packed = samples_of(tmp_path)["train"]
    assert set(packed) == {f"{image_id:012d}" for image_id in coco.imgs}
    classes = {category.id: category.name for category in open_dataset(str(tmp_path)).categories}
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
            assert instance.area == expected.get("area")
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
    assert sum(row["kind"] == "mask" for row in accounts_of(tmp_path)) == masks
    assert {row["status"] for row in accounts_of(tmp_path)} == {"packed"}


def test_supercategories_quotas_and_named_splits(scenes: Path, tmp_path: Path) -> None:
    arguments = ("--classes", "vehicle", "person", "--per-class", "3", "--eval-per-class", "1")
    assert run(scenes, tmp_path, *arguments, annotations=("train=instances.json", "val=val.json")) == 0
    dataset = open_dataset(str(tmp_path))
    assert [category.name for category in dataset.categories] == ["vehicle", "person"]
    assert dataset.splits == ("train", "val")
    found = samples_of(tmp_path)
    assert all(key.startswith("train-") for key in found["train"])
    assert {i.label for s in found["train"].values() for i in s.instances} <= {"car", "truck", "person"}
    for split, quota in (("train", 3), ("val", 1)):
        for category in (1, 2):
            assert sum(any(i.category_id == category for i in s.instances) for s in found[split].values()) >= quota


def test_splits_may_have_their_own_roots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):  # one file name for two images
        write_coco(tmp_path / split, images=3, seed=3)
        for path in (tmp_path / split / "images").rglob("*.jpg"):
            path.write_bytes(path.read_bytes() + split.encode())
    files = tuple(f"{split}={split}/instances.json" for split in ("train", "val"))
    roots = [f"{split}={tmp_path / split / 'images'}" for split in ("train", "val")]
    assert run(tmp_path, tmp_path / "out", "--images", *roots, annotations=files) == 0
    for split, samples in samples_of(tmp_path / "out").items():
        assert len(samples) == 3
        assert all(sample.image.endswith(split.encode()) for sample in samples.values())
    source = json.loads((tmp_path / "out" / "dataset.json").read_text())["source"]
    assert source["images"] == " ".join(roots)
    assert run(tmp_path, tmp_path / "no", "--images", roots[0], annotations=files) == 2
    assert "--images has no root for val, only for train: add val=URL" in capsys.readouterr().err


def test_one_file_can_be_partitioned_and_all_annotations_kept(scenes: Path, tmp_path: Path) -> None:
    parts = ("--splits", "partition", "--partition", "0.5", "0.25", "0.25")
    assert run(scenes, tmp_path, "--classes", "person", "--all-annotations", *parts) == 0
    dataset = open_dataset(str(tmp_path))
    assert [category.name for category in dataset.categories] == ["person", "car", "dog", "truck"]
    coco = COCO(str(scenes / "instances.json"))
    found = samples_of(tmp_path)
    assert len(found) > 1
    for key, sample in [pair for samples in found.values() for pair in samples.items()]:
        assert len(sample.instances) == len(coco.imgToAnns[int(key)])


def test_a_list_names_images_by_id_key_or_file(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1\n000000000008\npart0/picture.1.2\nnowhere\n")
    run(scenes, tmp_path / "out", "--images-list", str(tmp_path / "ids.txt"), "--classes", "dog")
    assert set(samples_of(tmp_path / "out")["train"]) == {f"{n:012d}" for n in (1, 8, 15)}
    unknown = [row["image_id"] for row in accounts_of(tmp_path / "out") if row["status"] == "image-unknown"]
    assert unknown == ["nowhere"]


def test_images_without_objects_are_named_and_packed_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    value = write_coco(tmp_path, images=6)
    value["annotations"] = [row for row in value["annotations"] if row["image_id"] not in (1, 8)]
    (tmp_path / "instances.json").write_text(json.dumps(value))
    caplog.set_level("INFO")
    assert run(tmp_path, tmp_path / "out") == 0
    assert len(samples_of(tmp_path / "out")["train"]) == 4
    assert "train: 2 images without an object of the requested classes: left out (--keep-empty" in caplog.text
    assert run(tmp_path, tmp_path / "all", "--keep-empty") == 0
    samples = samples_of(tmp_path / "all")["train"]
    assert len(samples) == 6
    for number in (1, 8):
        empty = samples[f"{number:012d}"]
        assert (empty.instances, empty.verified_present, empty.verified_absent) == ((), (), (1, 2, 3, 4))
    assert "--keep-empty" in (tmp_path / "all" / "README.md").read_text()
    capsys.readouterr()
    assert inspect(["--verify", str(tmp_path / "all")]) == 0
    assert run(tmp_path, tmp_path / "no", "--keep-empty", "--per-class", "2") == 2
    assert "--keep-empty packs all images: omit --per-class" in capsys.readouterr().err


def test_images_of_other_formats_are_stored_or_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    value = write_coco(tmp_path, images=3)
    for image, suffix in zip(value["images"], (".png", ".webp", ".bmp"), strict=True):
        old = tmp_path / "images" / image["file_name"]
        image["file_name"] = str(Path(image["file_name"]).with_suffix(suffix))
        Image.open(old).save(tmp_path / "images" / image["file_name"])
        old.unlink()
    (tmp_path / "instances.json").write_text(json.dumps(value))
    assert run(tmp_path, tmp_path / "out") == 3
    for image in value["images"][1:]:
        what = f"1 image named {Path(image['file_name']).suffix}, such as {image['file_name']}"
        assert f"{what}: shards hold JPEG and PNG; --to-jpeg 95 converts the others" in caplog.messages
    [stored] = samples_of(tmp_path / "out")["train"].values()
    assert stored.image == (tmp_path / "images" / value["images"][0]["file_name"]).read_bytes()
    details = [row["detail"] for row in accounts_of(tmp_path / "out") if row["status"] == "image-undecodable"]
    assert "a WebP: shards hold JPEG and PNG; --to-jpeg 95 converts it" in details
    assert run(tmp_path, tmp_path / "jpeg", "--to-jpeg", "95") == 0
    for dataset, version in (("out", 2), ("jpeg", 1)):
        assert json.loads((tmp_path / dataset / "dataset.json").read_text())["version"] == version
        assert inspect(["--verify", str(tmp_path / dataset)]) == 0
    converted = samples_of(tmp_path / "jpeg")["train"]
    assert {one.file_name[-4:] for one in converted.values()} == {".jpg"}
    assert converted[stored.image_id].instances == stored.instances
    assert "--to-jpeg 95" in (tmp_path / "jpeg" / "README.md").read_text()
    assert run(tmp_path, tmp_path / "out") == 3
    assert run(tmp_path, tmp_path / "out", "--to-jpeg", "95") == 2  # another dataset


def test_failed_images_and_masks_are_in_the_accounts(scenes: Path, tmp_path: Path) -> None:
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    value = json.loads((root / "instances.json").read_text())
    gone, small, damaged = value["images"][:3]
    (root / "images" / gone["file_name"]).unlink()
    (root / "images" / small["file_name"]).write_bytes(jpeg(50, 5, 0))  # of another shape than the file says
    for annotation in value["annotations"]:
        if annotation["image_id"] == small["id"]:
            annotation["segmentation"] = [[1, 1, 9, 1, 9, 9]]
        elif annotation["image_id"] == damaged["id"]:
            annotation["segmentation"] = {"size": [1, 1], "counts": "bad"}
    (root / "instances.json").write_text(json.dumps(value))
    run(root, tmp_path / "out")
    rows = accounts_of(tmp_path / "out")
    failed = {(row["kind"], int(row["image_id"]), row["status"]) for row in rows}
    assert ("image", gone["id"], "image-missing") in failed
    assert {("image", small["id"], "image-shape"), ("mask", small["id"], "image-failed")} <= failed
    assert ("mask", damaged["id"], "mask-undecodable") in failed
    names = {row["source"] for row in rows if row["kind"] == "image"}
    assert names == {image["file_name"] for image in value["images"]}
    assert len({(row["kind"], row["source"]) for row in rows}) == len(rows)


def opened(value: dict[str, Any], filters: Filters = NO_FILTERS, *classes: str) -> ListedSplit:
    path = Location("memory://coco-tests/instances.json")
    path.write(json.dumps(value).encode())
    source = Coco(Location("memory://coco-tests/images"), (("train", path),))
    return source.open_split("train", source.taxonomy().choose(classes), filters)


def test_filters_and_verified_classes() -> None:
    categories = [{"id": n, "name": name, "supercategory": "pet"} for n, name in ((1, "dog"), (2, "cat"), (3, "emu"))]
    shared = {"image_id": 1, "bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 5, 1, 5, 5]]}
    own = ({"id": 1, "category_id": 1, "predicted_iou": 0.4}, {"id": 2, "category_id": 2, "iscrowd": 1})
    annotations = [shared | each for each in own]
    value = document(categories=categories, annotations=annotations)
    key = "000000000001"
    split = opened(value, Filters(min_predicted_iou=0.5), "pet", "dog", "emu")
    image = split.describe([key])[key]
    assert [(p.annotation.category_id, p.has_mask) for p in image.objects] == [(2, False), (1, True)]
    assert image.objects[0].annotation.box == (0.1, 0.5, 0.125, 0.625)
    assert (image.verified_present, image.verified_absent) == ((1, 2), (3,))
    assert split.candidates() == {1: Candidates((key,)), 2: Candidates((), (key,)), 3: Candidates()}
    assert not len(opened(value, Filters(drop=("group-of",)), "cat").candidates()[1])
    lvis = {**value, "images": [{**IMAGE, "neg_category_ids": [3], "not_exhaustive_category_ids": [2]}]}
    image = opened(lvis, Filters(), "dog", "cat", "emu").describe([key])[key]
    assert (image.verified_present, image.verified_absent, image.not_exhaustive) == ((1, 2), (3,), (2,))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"mask_score": 0.5, "mask_run": "seed-1"}, MaskPrediction(0.5, "seed-1")),
        ({"mask_score": "0.5", "mask_run": 7}, MaskPrediction(0.0, "unknown")),  # never taken for a mask of the source
        ({"mask_score": 0.5, "mask_run": "seed-1", "segmentation": []}, None),
        ({"mask_source": "human"}, None),
    ],
)
def test_a_predicted_mask_stays_one(stated: dict[str, Any], expected: MaskPrediction | None) -> None:
    shared = {"image_id": 1, "id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 5, 1, 5, 5]]}
    split = opened(document(annotations=[shared | {"mask_source": "predicted"} | stated]))
    [found] = split.describe(["000000000001"])["000000000001"].objects
    assert found.annotation.prediction == expected
    assert found.has_mask == ("mask_source" in stated)
    assert split.totals()[1].masks == found.has_mask


def test_parse_places_takes_one_file_or_one_per_split() -> None:
    assert parse_places(["https://x/i.json?sig=a=b"]) == ((("train", "https://x/i.json?sig=a=b"),), False)
    assert parse_places(["train=a", "val=b"]) == ((("train", "a"), ("val", "b")), True)
    for wrong in (["a", "b"], ["train=a", "train=b"], ["train=a", "dev=b"]):
        with pytest.raises(UserError, match="train=URL"):
            parse_places(wrong)
