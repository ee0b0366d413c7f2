import json
from pathlib import Path

import pytest

from demo.scenes import SceneTruth
from maskstream.cli import main
from tests.builder.coco_scenes import document

Capture = pytest.CaptureFixture[str]


def listed(capsys: Capture, *words: str) -> dict[str, dict[str, dict[str, int]]]:
    assert main(["classes", "--json", *words]) == 0
    value: dict[str, dict[str, dict[str, int]]] = json.loads(capsys.readouterr().out)
    return value


def test_classes_of_open_images_have_counts_per_split(scenes: SceneTruth, capsys: Capture) -> None:
    places = ("--annotations", str(scenes.annotations))
    found = listed(capsys, *places)
    assert list(found) == ["train", "val", "test"]
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        truth = scenes.splits[name]
        assert sum(one["masks"] for one in found[split].values()) == sum(truth.masks.values())
        boxes = sum(one["boxes"] for one in found[split].values())
        assert boxes == sum(truth.boxes.values()) + truth.group_boxes
    with_children = listed(capsys, *places, "--classes", "Person")["train"]["Person"]
    alone = listed(capsys, *places, "--classes", "Person", "--exact-classes")["train"]["Person"]
    assert alone == found["train"]["Person"]
    assert with_children["boxes"] > alone["boxes"]
    assert max(alone["images"], 1) < with_children["images"] <= len(scenes.splits["train"].sizes)


def test_classes_of_coco_files_are_a_table(tmp_path: Path, capsys: Capture) -> None:
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    objects = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]} for _ in range(3)]
    objects[0]["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    (tmp_path / "x.json").write_text(json.dumps(document(categories=categories, annotations=objects)))
    assert main(["classes", "--source", "coco", "--annotations", str(tmp_path / "x.json")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:5] == [
        "train",
        "class images masks boxes",
        "cat 0 0 0",
        "dog 1 1 3",
        "train: 2 classes, 1 with masks",
    ]
