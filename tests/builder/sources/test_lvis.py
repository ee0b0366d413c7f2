import json
from pathlib import Path
from typing import Any

import pytest

from builder.commands.cli import main
from shards.export.cli import main as export
from shards.format.dataset import open_dataset
from shards.inspect.cli import main as inspect
from tests.builder.builds import samples_of
from tests.support import jpeg
from trainer.data.collate import verified_classes

NAMES = ("ant", "bee", "cow", "dog")  # ids 1 to 4
# The annotated classes of each image, its negative classes, and those not annotated exhaustively.
LABELS: list[tuple[list[int], list[int], list[int]]] = [([1, 1, 2], [3], [2]), ([3], [1, 2], []), ([], [2], [])]


def entry(number: int) -> dict[str, Any]:
    url = f"http://images.cocodataset.org/{'val' if number else 'train'}2017/{number:012d}.jpg"
    lists = {"neg_category_ids": LABELS[number][1], "not_exhaustive_category_ids": LABELS[number][2]}
    return {"id": number, "width": 48, "height": 32, "coco_url": url, **lists}


def document(**changes: Any) -> dict[str, Any]:
    annotation = {"bbox": [1, 1, 9, 9], "segmentation": [[1, 1, 10, 1, 10, 10, 1, 10]], "area": 81}
    pairs = [(number, category) for number, (found, _, _) in enumerate(LABELS) for category in found]
    return {
        "images": [entry(number) for number in range(3)],
        "categories": [{"id": number, "name": name, "frequency": "f"} for number, name in enumerate(NAMES, 1)],
        "annotations": [
            {**annotation, "id": n, "image_id": image, "category_id": c} for n, (image, c) in enumerate(pairs, 1)
        ],
        **changes,
    }


def run(root: Path, value: dict[str, Any], *arguments: str, source: str = "lvis") -> int:
    (root / "lvis.json").write_text(json.dumps(value))
    places = ["--images", str(root / "images"), "--annotations", str(root / "lvis.json"), "--out", str(root / "out")]
    return main(["--source", source, *places, "--workers", "1", *arguments])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for image in document()["images"]:
        path = tmp_path / "images" / "/".join(image["coco_url"].split("/")[-2:])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(48, 32, image["id"]))
    return tmp_path


def test_verified_and_partly_annotated_classes_are_those_of_lvis(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(root, document(), "--keep-empty") == 0
    dataset = open_dataset(root / "out")
    assert [category.name for category in dataset.categories] == list(NAMES)
    assert dataset.info.version == 2  # earlier readers would teach that what is not annotated is absent
    samples = samples_of(root / "out")["train"]
    for number, (annotated, absent, partial) in enumerate(LABELS):
        sample = samples[f"{number:012d}"]
        assert [instance.category_id for instance in sample.instances] == annotated
        assert sample.verified_present == tuple(sorted(set(annotated)))
        assert (sample.verified_absent, sample.not_exhaustive) == (tuple(absent), tuple(partial))
        taught = {*annotated, *absent, 0}.difference(partial)
        assert set(verified_classes(sample, 5).nonzero().flatten().tolist()) == taught
    assert inspect(["--verify", str(root / "out")]) == 0
    capsys.readouterr()
    assert export([str(root / "out"), "--to", "coco", "--out", str(root / "coco")]) == 0
    places = ["--images", str(root / "coco" / "train"), "--out", str(root / "again"), "--keep-empty", "--workers", "1"]
    again = ["--source", "coco", "--annotations", str(root / "coco" / "annotations" / "instances_train.json")]
    assert main([*again, *places]) == 0
    for key, sample in samples_of(root / "again")["train"].items():
        for name in ("instances", "verified_present", "verified_absent", "not_exhaustive"):
            assert getattr(sample, name) == getattr(samples[key], name)


def test_a_choice_of_classes_keeps_images_that_say_something_about_them(root: Path) -> None:
    assert run(root, document(), "--classes", "bee", "dog", "--keep-empty") == 0
    samples = samples_of(root / "out")["train"]
    lists = {int(key): (s.verified_present, s.verified_absent, s.not_exhaustive) for key, s in samples.items()}
    assert lists == {0: ((1,), (), (1,)), 1: ((), (1,), ()), 2: ((), (1,), ())}


def test_a_class_with_an_unannotated_kind_is_not_absent(root: Path) -> None:
    kinds = [{"id": 1, "name": "ant"}, {"id": 2, "name": "insect"}, {"id": 3, "name": "bee", "supercategory": "insect"}]
    image = {**entry(0), "neg_category_ids": [2], "not_exhaustive_category_ids": [3]}
    value = document(images=[image], categories=kinds, annotations=document()["annotations"][:1])
    assert run(root, value, "--classes", "ant", "insect", "bee") == 0
    [sample] = samples_of(root / "out")["train"].values()
    assert (sample.verified_absent, sample.not_exhaustive) == ((), (2, 3))
    assert inspect(["--verify", str(root / "out")]) == 0


@pytest.mark.parametrize(
    ("value", "source", "message"),
    [
        (document(), "coco", "images[0]: has no file_name, as in LVIS: give --source lvis"),
        (
            document(images=[{"id": 1, "file_name": "a.jpg", "width": 1, "height": 1}]),
            "lvis",
            "images[0] has no list 'neg_category_ids': give LVIS files, or --source coco",
        ),
        (document(images=[{**entry(0), "coco_url": None}]), "lvis", "images[0]: 'coco_url' is 'None', not of type str"),
        (document(annotations=[{"segments_info": []}]), "coco", "is a panoptic file (it has segments_info)"),
    ],
)
def test_files_of_another_kind_are_refused(
    root: Path, capsys: pytest.CaptureFixture, value: dict[str, Any], source: str, message: str
) -> None:
    assert run(root, value, source=source) == 2
    assert message in capsys.readouterr().err
