"""Masks that a run predicted, through the format: written, read, counted, selected and verified apart from others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shards.common.errors import DatasetError
from shards.format.dataset import open_dataset
from shards.format.dataset_card import features
from shards.format.dataset_writer import DatasetWriter
from shards.format.index_schema import INDEX_SCHEMA, IndexRow, index_bytes
from shards.format.sample import MaskPrediction, Sample
from shards.inspect.cli import main as inspect
from tests.builder.builds import samples_of
from tests.support import CATEGORIES, filled, sample, write_dataset, write_spoilt


def test_json_says_where_a_predicted_mask_is_from_and_no_other_mask_has_the_keys() -> None:
    person, car = json.loads(filled(1).to_members()["json"])["annotations"]
    keys = {"mask_source": "predicted", "mask_score": 0.93, "mask_run": "seed-1"}
    assert {key: car.pop(key) for key in keys} == keys
    assert person.keys() == car.keys() == sample(1).instances[0].to_json().keys()
    assert Sample.from_members(filled(1).image_id, filled(1).to_members()) == filled(1)
    assert filled(1).version == 3
    without = filled(1).without_predictions()
    assert [one.segmentation is not None for one in without.instances] == [True, False]
    assert (without.version, without.without_predictions(), filled(1).instances[1].source_mask) == (1, without, None)
    assert repr(filled(1)).endswith("2 objects, 1 mask, 1 predicted mask)")


def test_a_dataset_counts_selects_and_verifies_predicted_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with DatasetWriter(tmp_path, CATEGORIES, samples_per_shard=2) as writer:
        for number in range(3):
            writer.add(filled(number))
        wrong = replace(filled(5), instances=(replace(filled(5).instances[1], prediction=MaskPrediction(2, "a")),))
        with pytest.raises(DatasetError, match="annotation 0: mask_score 2 is not from 0 to 1"):
            writer.add(wrong)
    dataset = open_dataset(tmp_path)
    assert sorted(shard.version for shard in dataset.info.shards) in ([1, 3], [3])
    assert (dataset.info.version, features(3) == features(2)) == (3, False)
    index = dataset.index("train")
    assert index.counts("masks", CATEGORIES) == {1: 3, 2: 0}
    assert index.counts("predicted", CATEGORIES) == {1: 0, 2: 1}
    cars = dataset.select(classes=["Car"]).index("train")
    assert (len(cars), cars.counts("predicted", CATEGORIES)) == (1, {1: 0, 2: 1})
    assert samples_of(tmp_path)["train"] == {filled(number).image_id: filled(number) for number in range(3)}
    assert set(dataset.accounts().query("kind == 'mask'")["source"]) == {"annotations[0]"}  # of the source
    assert "predicted 1 mask, for objects" in (tmp_path / "README.md").read_text()
    assert inspect([str(tmp_path), "--verify"]) == 0
    assert "4 boxes, 3 masks, 1 predicted mask, " in capsys.readouterr().out
    rows = [IndexRow.from_values(values) for values in dataset.table.to_pylist()]
    assert index_bytes(rows, {s.path: s.samples for s in dataset.info.shards}) == dataset.columns.data


def test_an_index_without_predicted_masks_has_no_such_column_and_counts_none(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"train": [sample(1)]}).index("train")
    assert pq.read_schema(tmp_path / "index.parquet").names == INDEX_SCHEMA.names
    assert index.counts("predicted", CATEGORIES) == {1: 0, 2: 0}


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda car: car.update(mask_score=1.5), "annotation 1: mask_score 1.5 is not from 0 to 1"),
        (lambda car: car.update(mask_run=""), "annotation 1: mask_run is empty"),
        (
            lambda car: car.update(mask_score=0.5, segmentation=None),
            "annotation 1: mask_source is predicted, and there",
        ),
        (lambda car: car.update(mask_source="human"), "mask_source is 'human', not 'predicted'"),
        (lambda car: car.pop("mask_run"), "KeyError('mask_run')"),
        (lambda car: car.update(mask_run=None), "mask_run is None, not a text"),
        (lambda car: None, "it needs format version 3, dataset.json says 1"),
        (lambda car: None, "the index says predicted [], the shard has [0, 1]"),
    ],
)
def test_verify_reports_a_faulty_prediction(
    edit: Callable[[dict[str, Any]], Any], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(value: dict[str, Any]) -> None:
        value["annotations"] = [one.to_json() for one in filled(1).instances]
        edit(value["annotations"][1])

    write_spoilt(tmp_path, spoil)
    assert inspect([str(tmp_path), "--verify"]) == 1
    assert fault in capsys.readouterr().out
