"""The builder on real photographs in the Open Images layout, with planted faults, where that folder is present."""

import csv
import io
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builder.sources.base import Filters
from builder.sources.openimages.layout import source_location
from builder.sources.openimages.source import OpenImages
from shards.format import rle
from shards.format.dataset import Dataset, open_dataset
from shards.format.sample import Sample
from shards.storage.location import Location
from tests.builder.builds import accounts_of, build, quotas, samples_of
from tests.support import REPOSITORY

SAMPLE = REPOSITORY / ".." / "shared" / "openimages-sample"
pytestmark = pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"{SAMPLE} is not here")

SOURCE_SPLIT = {"train": "train", "val": "validation", "test": "test"}
CLASSES = ("Person", "Car", "Traffic light", "Traffic sign", "Dog", "Pizza", "Taxi")
CHOICE = quotas(CLASSES, 1000, 1000, images_per_shard=8)


# Category id -> the labels that count for it.
LABELS = {
    1: {"/m/01g317", "/m/04yx4", "/m/03bt1vf", "/m/01bl7v", "/m/05r655"},
    2: {"/m/0k4j", "/m/01lcw4", "/m/0h2r6"},
    3: {"/m/015qff"},
    4: {"/m/01mqdt", "/m/02pv19"},
    5: {"/m/0bt9lr"},
    6: {"/m/0663v"},
    7: {"/m/0pg52"},
}
OWNERS = {label: category for category, labels in LABELS.items() for label in labels}


def source() -> OpenImages:
    return OpenImages(source_location(str(SAMPLE / "open-images-dataset")), source_location(str(SAMPLE / "openimages")))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("sample") / "out"
    build(source(), CHOICE, Location(str(root)))
    return open_dataset(str(root))


@pytest.fixture(scope="module")
def samples(built: Dataset) -> dict[str, dict[str, Sample]]:
    """Split -> ImageID -> sample."""
    return samples_of(Path(built.root.path))


def rows(table: str) -> list[dict[str, str]]:
    with open(SAMPLE / "openimages" / table, newline="") as file:
        return list(csv.DictReader(file))


def source_mask(split: str, name: str) -> Image.Image:
    """The source's PNG by the standard library, which shares no code with the range reader."""
    with zipfile.ZipFile(SAMPLE / "openimages/v5" / f"{split}-masks" / f"{split}-masks-{name[0]}.zip") as archive:
        return Image.open(io.BytesIO(archive.read(name)))


def boxes_of(split: str) -> list[dict[str, str]]:
    return rows(f"{'v6/oidv6-train' if split == 'train' else f'v5/{SOURCE_SPLIT[split]}'}-annotations-bbox.csv")


def masks_of(split: str) -> list[dict[str, str]]:
    return rows(f"v5/{SOURCE_SPLIT[split]}-annotations-object-segmentation.csv")


def test_every_requested_image_and_mask_has_one_account_and_only_planted_faults_fail(built: Dataset) -> None:
    accounts = accounts_of(Path(built.root.path))
    assert max(Counter((row["kind"], row["source"]) for row in accounts).values()) == 1
    for split in SOURCE_SPLIT:
        wanted = {row["MaskPath"] for row in masks_of(split) if row["LabelName"] in OWNERS}
        assert {row["source"] for row in accounts if row["kind"] == "mask" and row["split"] == split} == wanted
    assert sum(row["kind"] == "image" and row["status"] == "packed" for row in accounts) == built.table.num_rows
    failed = {row["source"]: row["status"] for row in accounts if row["status"] != "packed"}
    reasons = {
        "image in the CSVs, absent from the bucket": "image-missing",
        "JPEG truncated to half": "image-undecodable",
        "mask in the CSV, absent from its zip": "mask-missing",
        "mask PNG truncated to half": "mask-undecodable",
        "mask PNG all zero": "mask-empty",
    }
    planted = dict(line.split("\t") for line in (SAMPLE / "FAULTS.tsv").read_text().splitlines())
    expected = {name if name.endswith(".png") else f"{name}.jpg": reasons[fault] for name, fault in planted.items()}
    assert {name: status for name, status in failed.items() if status != "image-failed"} == expected
    lost = {name.split("_")[0] + ".jpg" for name, status in failed.items() if status == "image-failed"}
    assert lost <= {name for name, status in expected.items() if status.startswith("image-")}


def test_every_box_is_in_its_sample_with_or_without_a_mask(samples: dict[str, dict[str, Sample]]) -> None:
    without_mask = groups = 0
    for split in SOURCE_SPLIT:
        for row in boxes_of(split):
            sample = samples[split].get(row["ImageID"])
            if sample is None or row["LabelName"] not in {i.label for i in sample.instances}:
                continue
            x, y = float(row["XMin"]) * sample.width, float(row["YMin"]) * sample.height
            w, h = float(row["XMax"]) * sample.width - x, float(row["YMax"]) * sample.height - y
            same_label = [i for i in sample.instances if i.label == row["LabelName"]]
            matching = [i for i in same_label if np.allclose(i.bbox, (x, y, w, h), atol=0.01)]
            assert matching, row
            assert any(i.is_group_of == (row["IsGroupOf"] == "1") for i in matching)
            without_mask += any(i.segmentation is None for i in matching)
            groups += any(i.is_group_of for i in matching)
    assert without_mask > 100
    assert groups > 0


def test_jpegs_verified_classes_and_attribution_equal_the_source(samples: dict[str, dict[str, Sample]]) -> None:
    for split, source_split in SOURCE_SPLIT.items():
        folder = "train-images-boxable" if split == "train" else f"{source_split}-images"
        metadata = {row["ImageID"]: row for row in rows(f"2018_04/{source_split}/{folder}-with-rotation.csv")}
        present = {
            (row["ImageID"], row["LabelName"])
            for row in rows(f"v5/{source_split}-annotations-human-imagelabels-boxable.csv")
            if row["Confidence"] == "1"
        }
        assert samples[split]
        for image_id, sample in samples[split].items():
            assert sample.image == (SAMPLE / "open-images-dataset" / source_split / f"{image_id}.jpg").read_bytes()
            found = (sample.license, sample.original_url, sample.author, sample.author_url, sample.title)
            columns = ("License", "OriginalURL", "Author", "AuthorProfileURL", "Title")
            assert found == tuple(metadata[image_id][column] for column in columns)
            assert sample.rotation == int(float(metadata[image_id]["Rotation"] or 0))
            for category, labels in LABELS.items():
                assert (category in sample.verified_present) == any((image_id, label) in present for label in labels)
            assert not set(sample.verified_present) & set(sample.verified_absent)


def test_masks_their_labels_estimates_and_flags_equal_the_source(
    built: Dataset, samples: dict[str, dict[str, Sample]]
) -> None:
    packed = {row["source"] for row in accounts_of(Path(built.root.path)) if row["status"] == "packed"}
    counts = Counter[str]()
    for split, source_split in SOURCE_SPLIT.items():
        flags = {
            (row["ImageID"], row["LabelName"], *(f"{float(row[c]):.4f}" for c in ("XMin", "XMax", "YMin", "YMax"))): row
            for row in boxes_of(split)
        }
        for row in masks_of(split):
            sample = samples[split].get(row["ImageID"])
            if sample is None or row["LabelName"] not in OWNERS:
                continue
            [instance] = [i for i in sample.instances if i.box_id == row["BoxID"]]
            assert (instance.label, instance.category_id) == (row["LabelName"], OWNERS[row["LabelName"]])
            assert instance.predicted_iou == float(row["PredictedIoU"])
            counts["of children"] += instance.label != built.categories[instance.category_id - 1].mid
            corners = (f"{float(row[c]):.4f}" for c in ("BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax"))
            box = flags.get((row["ImageID"], row["LabelName"], *corners))
            if box is not None:
                assert instance.is_truncated == (box["IsTruncated"] == "1")
                assert instance.is_occluded == (box["IsOccluded"] == "1")
                counts["flagged"] += 1
            assert (instance.segmentation is not None) == (row["MaskPath"] in packed)
            if instance.segmentation is not None:
                png = source_mask(source_split, row["MaskPath"])
                expected = np.asarray(png.resize((sample.width, sample.height), Image.Resampling.NEAREST)) != 0
                assert (rle.decode(instance.segmentation) == expected).all()
                counts["packed"] += 1
                counts["resized"] += png.size != (sample.width, sample.height)
    assert counts["of children"] > 0
    assert counts["flagged"] > 100
    assert counts["packed"] > 200
    assert counts["resized"] > counts["packed"] / 2


def test_filters_leave_out_exactly_what_they_name(built: Dataset, samples: dict, tmp_path: Path) -> None:
    filters = Filters(min_predicted_iou=0.8, drop=("truncated", "group-of"), require_mask=True)
    build(source(), CHOICE | {"filters": filters}, Location(str(tmp_path)))
    found = {key: sample for split in samples_of(tmp_path).values() for key, sample in split.items()}
    everything = {key: sample for split in samples.values() for key, sample in split.items()}
    assert set(found) <= set(everything)
    for key, sample in everything.items():
        kept = [i for i in sample.instances if not (i.is_truncated or i.is_group_of)]
        has_mask = any(i.box_id and (i.predicted_iou or 0) >= 0.8 for i in kept)
        assert (key in found) == has_mask
        if has_mask:
            expected = [(i.label, i.bbox, i.segmentation if (i.predicted_iou or 0) >= 0.8 else None) for i in kept]
            assert [(i.label, i.bbox, i.segmentation) for i in found[key].instances] == expected
    low = [row for row in accounts_of(tmp_path) if row["status"] == "mask-filtered"]
    assert low
    assert all("--min-predicted-iou is 0.8" in row["detail"] for row in low)
