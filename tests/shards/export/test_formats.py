"""Each format, read back by the library or the rule that its trainer reads it with."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from matplotlib.path import Path as MplPath
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from builder.commands.cli import main as build
from shards.drawing.contours import contours
from shards.export import rfdetr
from shards.export.cli import main
from shards.export.export import Export, Tally
from shards.export.yolo import outline
from shards.format import rle
from shards.format.dataset import Dataset, open_dataset
from shards.format.image import exif_orientation
from shards.format.sample import Instance, Sample
from tests.builder.builds import samples_of

Capture = pytest.CaptureFixture[str]


def export(dataset: Dataset, out: Path, to: str, *more: str) -> dict[str, dict[str, Sample]]:
    """Export all splits; return the dataset's samples by split and key."""
    assert main([str(dataset.root), "--to", to, "--out", str(out), *more]) == 0
    return samples_of(Path(dataset.root.path))


def area_of(instance: Instance) -> float:
    if instance.area is not None:
        return instance.area
    if instance.source_mask is not None:
        return float(rle.decode(instance.source_mask).sum())
    return instance.bbox[2] * instance.bbox[3]


def test_coco_is_what_pycocotools_reads(scenes: Dataset, out: Path, capsys: Capture) -> None:
    found = export(scenes, out, "coco")
    assert "objects without a mask, whose segmentation is empty: 7" in capsys.readouterr().out
    for split, samples in found.items():
        coco = COCO(str(out / "annotations" / f"instances_{split}.json"))
        assert {c["id"]: c["name"] for c in coco.cats.values()} == {c.id: c.name for c in scenes.categories}
        assert sorted(coco.imgs) == list(range(1, len(samples) + 1))
        for number, image in coco.imgs.items():
            sample = samples[image["file_name"].removesuffix(".jpg")]
            stored = (out / split / image["file_name"]).read_bytes()
            assert exif_orientation(stored) == 1
            assert (stored == sample.image) == (sample.image_id[-1] != "1")  # the one that is turned
            assert Image.open(out / split / image["file_name"]).size == (image["width"], image["height"])
            assert len(coco.imgToAnns[number]) == len(sample.instances)
            for entry, instance in zip(coco.imgToAnns[number], sample.instances):
                assert (entry["category_id"], tuple(entry["bbox"])) == (instance.category_id, instance.bbox)
                assert (entry["iscrowd"], entry["area"]) == (instance.is_group_of, area_of(instance))
                assert entry["is_occluded"] == instance.is_occluded
                stated = [entry.get(key) for key in ("mask_source", "mask_score", "mask_run")]
                assert stated == (["predicted", 0.75, "run"] if instance.prediction else [None] * 3)
                if instance.segmentation is None:
                    assert entry["segmentation"] == []
                else:
                    assert (coco.annToMask(entry) == rle.decode(instance.segmentation)).all()


def test_the_command_that_coco_prints_builds_the_same_masks_boxes_and_labels(
    scenes: Dataset, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = export(scenes, out, "coco")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    monkeypatch.chdir(out.parent)
    assert build([*command[1:], "--workers", "1"]) == 0
    rebuilt = open_dataset("shards")
    assert [category.name for category in rebuilt.categories] == [category.name for category in scenes.categories]
    names = {c.id: c.name for c in scenes.categories} | {-c.id: c.name for c in rebuilt.categories}
    for split, samples in samples_of(Path("shards")).items():
        assert len(samples) == len(found[split])
        for other in samples.values():
            sample = found[split][other.title.removesuffix(".jpg")]
            assert (other.license, other.original_url) == (sample.license, sample.original_url)
            assert [names[-c] for c in other.verified_present] == [names[c] for c in sample.verified_present]
            assert [names[-c] for c in other.verified_absent] == [names[c] for c in sample.verified_absent]
            for new, old in zip(other.instances, sample.instances, strict=True):
                assert (names[-new.category_id], new.segmentation) == (names[old.category_id], old.segmentation)
                assert new.prediction == old.prediction
                assert (new.bbox, new.is_group_of, new.area) == (old.bbox, old.is_group_of, area_of(old))


@pytest.mark.parametrize("to", ["folder", "yolo"])
def test_other_exports_are_built_again(scenes: Dataset, out: Path, to: str, tmp_path: Path, capsys: Capture) -> None:
    found = export(scenes, out, to)
    assert "predicted masks, written like masks of the source: 2" in capsys.readouterr().out
    splits = {split: out / split for split in found}
    places = ["--source", "yolo", "--annotations", str(out / "data.yaml")]
    if to == "folder":
        tables = [f"{split}={root / 'objects.csv'}" for split, root in splits.items()]
        images = [f"{split}={root / 'images'}" for split, root in splits.items()]
        places = ["--source", "masks", "--annotations", *tables, "--images", *images]
    assert build([*places, "--keep-empty", "--out", str(tmp_path / "again"), "--workers", "1"]) == 0
    rebuilt = samples_of(tmp_path / "again")
    names = {category.id: category.name for category in scenes.categories}
    for split, samples in found.items():
        assert len(rebuilt[split]) == len(samples)
        for key, sample in samples.items():
            other = rebuilt[split][f"{split}-{key}"]
            kept = [one for one in sample.instances if to == "folder" or not one.is_group_of]
            for new, old in zip(other.instances, kept, strict=True):
                assert (new.label, new.is_group_of) == (names[old.category_id], old.is_group_of)
                assert new.bbox == pytest.approx(old.bbox, abs=2e-3)
                if to == "folder":
                    assert (new.segmentation, new.is_occluded) == (old.segmentation, old.is_occluded)
                elif old.segmentation is not None and new.segmentation is not None:
                    bits, wanted = rle.decode(new.segmentation), rle.decode(old.segmentation)
                    assert (bits == wanted).all()


def fill(polygon: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the pixels whose centres are inside a polygon [n, 2], by matplotlib's even-odd rule, bool [H, W]."""
    y, x = np.mgrid[:height, :width] + 0.5
    return MplPath(polygon).contains_points(np.stack((x.ravel(), y.ravel()), axis=1)).reshape(height, width)


def test_yolo_polygons_fill_the_masks(scenes: Dataset, out: Path, capsys: Capture) -> None:
    found = export(scenes, out, "yolo")
    printed = capsys.readouterr().out
    for line in (
        "train: 8 images, 1 of them without an object, 17 objects",
        "objects without a mask, written as the four corners of their box: 7",
        "group-of regions, left out: the format has no crowds: 4",
        "objects of several parts or with holes, joined by lines into one polygon: ",
        f"next: yolo segment train data={out}/data.yaml model=",
    ):
        assert line in printed
    data = yaml.safe_load((out / "data.yaml").read_text())
    assert data == {"train": "images/train", "val": "images/val", "names": {0: "Person", 1: "Traffic light"}}
    masks = 0
    for split, samples in found.items():
        for sample in samples.values():
            assert (out / "images" / split / f"{sample.image_id}.jpg").is_file()
            lines = (out / "labels" / split / f"{sample.image_id}.txt").read_text().splitlines()
            kept = [instance for instance in sample.instances if not instance.is_group_of]
            for line, instance in zip(lines, kept, strict=True):
                name, *numbers = line.split()
                assert int(name) == {2: 0, 5: 1}[instance.category_id]
                polygon = np.array(numbers, float).reshape(-1, 2) * (sample.width, sample.height)
                x, y, w, h = instance.bbox
                corners = [*polygon.min(axis=0), *polygon.max(axis=0)]
                assert corners == pytest.approx([x, y, x + w, y + h], abs=1e-3)
                if instance.segmentation is not None:
                    masks += 1
                    assert (fill(polygon, sample.width, sample.height) == rle.decode(instance.segmentation)).all()
    assert masks > 10


def test_yolo_polygons_of_large_masks_have_fewer_points_and_an_iou_of_98_percent() -> None:
    y, x = np.mgrid[:300, :400]
    away, angle = np.hypot(x - 200, y - 150), np.arctan2(y - 150, x - 200)
    bits = (away < 110 + 30 * np.sin(5 * angle)) & (away > 40)
    encoded = rle.encode(bits)
    polygon = outline(Instance(1, rle.bounds(encoded), encoded), Tally("train"))
    found = fill(polygon, 400, 300)
    assert (found & bits).sum() / (found | bits).sum() > 0.98
    assert len(polygon) < 0.6 * sum(map(len, contours(bits)))


def test_rfdetr_shards_have_its_index_and_members(scenes: Dataset, out: Path) -> None:
    """The layout is that of rfdetr 1.11.2, whose own reader was compared by hand."""
    found = samples_of(Path(scenes.root.path))["train"]
    rfdetr.write_split(Export(scenes, out, "rfdetr", shard_bytes=8000), Tally("train"))
    index = json.loads((out / "train-index.json").read_text())
    tars = sorted(path.name for path in out.glob("*.tar"))
    assert {"version": 1, "split": "train", "num_samples": 8, "category_ids": "remap"}.items() <= index.items()
    assert (index["shards"], len(tars) > 2, index["annotated_category_ids"]) == (tars, True, [2, 5])
    assert [(c["id"], c["name"]) for c in index["categories"]] == [(2, "Person"), (5, "Traffic light")]
    counts = []
    for name in tars:
        members = list(webdataset.WebDataset(str(out / name), shardshuffle=False, empty_check=False))
        counts.append(len(members))
        for member in members:
            value = json.loads(member["json"])
            sample = found[member["__key__"]]
            assert type(value["image_id"]) is int
            assert (value["file_name"], member["jpg"][-100:]) == (f"{sample.image_id}.jpg", sample.image[-100:])
            for entry, instance in zip(value["annotations"], sample.instances, strict=True):
                assert (entry["category_id"], tuple(entry["bbox"])) == (instance.category_id, instance.bbox)
                assert (entry["iscrowd"], entry["area"]) == (instance.is_group_of, area_of(instance))
                if instance.segmentation is not None:
                    assert (coco_mask.decode(entry["segmentation"]) == rle.decode(instance.segmentation)).all()
    assert counts == index["samples_per_shard"]


def test_folder_has_a_png_per_mask_and_a_line_per_object(scenes: Dataset, out: Path) -> None:
    found = export(scenes, out, "folder", "--masks-only", "--classes", "Traffic light")
    pngs = []
    for split, samples in found.items():
        with open(out / split / "objects.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        kept = {
            sample.image_id: [i for i in sample.instances if i.category_id == 5 and i.segmentation is not None]
            for sample in samples.values()
            if any(instance.category_id == 5 for instance in sample.instances)
        }
        assert {path.stem for path in (out / split / "images").iterdir()} == set(kept)
        for row, (image_id, instance) in zip(rows, [(k, i) for k, found in kept.items() for i in found], strict=True):
            assert (row["image"], row["class"], row["is_group_of"]) == (image_id, "Traffic light", "1")
            assert row["mask"] == f"masks/{image_id}/{row['object']}_Traffic_light.png"
            assert instance.segmentation is not None
            png = np.asarray(Image.open(out / split / row["mask"]))
            assert (png == rle.decode(instance.segmentation) * 255).all()
            pngs.append(out / split / row["mask"])
    assert sorted(pngs) == sorted(out.rglob("*.png"))
    assert len(pngs) == 5
