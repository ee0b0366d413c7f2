from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.scenes import SceneTruth
from shards.common.errors import DatasetError, StorageError, UserError
from shards.format import rle
from shards.format.dataset import Category, open_dataset
from shards.format.dataset_writer import DatasetWriter
from shards.format.sample import Instance, Sample
from shards.inspect.cli import main
from shards.storage.location import Location
from shards.stream.streams import EvalStream
from tests.builder.builds import build, mirror, quotas, tree
from tests.support import CATEGORIES, jpeg, sample

PICTURE = jpeg(48, 32, 0)
MASK = np.zeros((32, 48), np.bool_)
MASK[4:20, 6:30] = True


def samples(root: str, split: str) -> list[Sample]:
    return [one for batch in EvalStream(open_dataset(root), split, batch_size=4) for one in batch]


def test_images_boxes_and_masks_become_a_finished_dataset(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with DatasetWriter(tmp_path / "pets", classes=["cat", "dog"]) as writer:
        writer.add_image("rex", PICTURE, [{"category": "dog", "mask": MASK}], license="CC0")
        numbers = {"bbox": np.array([1, 2, 3, 4]), "predicted_iou": np.float32(0.5)}
        crowd: Any = {"category": 1, "is_group_of": True, **numbers}
        writer.add_image("tom", PICTURE, [crowd], split="val", verified_absent=[])
        writer.add_image("zoo", PICTURE, split="test", not_exhaustive=["cat"])
        assert repr(writer) == f"DatasetWriter('{tmp_path}/pets', 3 samples)"
        assert not (tmp_path / "pets").exists()
    assert main([str(tmp_path / "pets"), "--verify"]) == 0
    capsys.readouterr()
    [rex], [tom], [zoo] = (samples(str(tmp_path / "pets"), split) for split in ("train", "val", "test"))
    assert (rex.image, rex.license, rex.verified_present, rex.verified_absent) == (PICTURE, "CC0", (2,), (1,))
    assert rex.instances == (Instance(2, (6.0, 4.0, 24.0, 16.0), rle.encode(MASK), label="dog"),)
    assert tom.instances == (Instance(1, (1.0, 2.0, 3.0, 4.0), None, "", "cat", True, predicted_iou=0.5),)
    assert (tom.verified_present, tom.verified_absent) == ((1,), ())
    assert (zoo.verified_present, zoo.verified_absent, zoo.not_exhaustive) == ((), (2,), (1,))
    accounts = open_dataset(tmp_path / "pets").accounts()
    assert accounts[["kind", "image_id", "status"]].to_numpy().tolist() == [
        ["image", "rex", "packed"],
        ["mask", "rex", "packed"],
        ["image", "tom", "packed"],
        ["image", "zoo", "packed"],
    ]
    card = (tmp_path / "pets" / "README.md").read_text()
    assert "# Images and instance masks: cat, dog" in card
    assert "DatasetWriter(samples_per_shard=256, seed=0)" in card
    assert "3 images in 3 tar shards (" in card


def test_the_order_in_which_samples_are_added_does_not_matter(tmp_path: Path) -> None:
    numbers = range(12)
    for name, order in (("a", numbers), ("b", reversed(numbers))):
        with DatasetWriter(tmp_path / name, CATEGORIES, samples_per_shard=5, seed=3) as writer:
            for number in order:
                writer.add(sample(number))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert [shard.samples for shard in open_dataset(tmp_path / "a").info.shards] == [5, 5, 2]


def test_samples_of_the_builder_are_packed_to_the_same_bytes(scenes: SceneTruth, tmp_path: Path) -> None:
    build(
        mirror(scenes),
        quotas(("Person", "Car"), 1000, 1000, images_per_shard=9, seed=7),
        Location(str(tmp_path / "built")),
    )
    built = open_dataset(tmp_path / "built")
    with DatasetWriter(tmp_path / "packed", built.categories, samples_per_shard=9, seed=7) as writer:
        for split in built.splits:
            for one in samples(built.root.url, split):
                writer.add(one, split)
    expected, found = tree(tmp_path / "built"), tree(tmp_path / "packed")
    assert found.keys() == expected.keys() - {"README.jpg"}
    for name in found.keys() - {"accounts.parquet", "README.md", "dataset.json"}:
        assert found[name] == expected[name], name
    assert open_dataset(tmp_path / "packed").info.shards == built.info.shards


@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_any_fsspec_url_can_be_written_and_numbers_of_numpy_are_stored(bucket: str, scheme: str) -> None:
    one, width, bbox, name = np.int64(1), np.int32(48), tuple(np.array([0, 0, 5, 5])), np.str_("cat")
    root = f"{scheme}://{bucket}/pets"
    with DatasetWriter(root, [Category(one, name, "")]) as writer:  # type: ignore[arg-type]
        writer.add(Sample("tom", PICTURE, width, 32, (Instance(one, bbox, None),)))  # type: ignore[arg-type]
    assert main([root, "--verify"]) == 0
    assert [one.image_id for one in samples(root, "train")] == ["tom"]


def test_an_exception_within_the_block_leaves_nothing(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), DatasetWriter(tmp_path / "x", ["cat"]) as writer:
        writer.add_image("tom", PICTURE)
        raise ZeroDivisionError
    assert not (tmp_path / "x").exists()


def test_a_failing_write_leaves_no_dataset_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(location: Location, data: bytes) -> None:
        if location.url.endswith("000001.tar"):
            raise StorageError("disk is full", permanent=True)
        write(location, data)

    write = Location.write
    monkeypatch.setattr(Location, "write", refuse)
    writer = DatasetWriter(tmp_path, CATEGORIES, samples_per_shard=2).__enter__()
    for number in range(4):
        writer.add(sample(number))
    with pytest.raises(StorageError, match="disk is full"):
        writer.__exit__(None, None, None)
    assert list(tree(tmp_path)) == ["train/000000.tar"]
    with pytest.raises(DatasetError, match=rf"unfinished dataset \(no .*: .* or delete {tmp_path}/train first$"):
        DatasetWriter(tmp_path, CATEGORIES).__enter__()


def box(*bbox: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"category": "cat", "bbox": bbox, **more}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", PICTURE, {"licence": "CC0"}), "unknown metadata 'licence': did you mean license?"),
        (("a", b"RIFF"), "sample a: the image cannot be read (not a JPEG or PNG): convert it to JPEG or PNG first"),
        (("a", PICTURE[:-300]), "sample a: a.jpg cannot be decoded: "),
        (("a", "cat.jpg"), "sample a: the image cannot be read: cat.jpg: there is no such object"),
        (("a/b", PICTURE), "only 1 to 64 letters, digits, '_' and '-'"),
        (("first", PICTURE), "sample first: was added before: give each image a key of its own"),
        (("a", PICTURE, box(1, 1, 50, 2)), "bbox [1, 1, 50, 2] leaves the image of 48x32: correct it (a JPEG or PNG; "),
        (("a", PICTURE, box(1, 1, 2)), "an instance of cat has the bbox (1, 1, 2): give x, y, width, height"),
        (("a", PICTURE, [{"category": "cat"}]), "has the bbox None: give x, y, width, height in pixels, or a mask"),
        (("a", PICTURE, [{"category": "cow", "mask": MASK}]), "there is no class 'cow': it has cat, dog"),
        (("a", PICTURE, [{"bbox": (1, 1, 2, 2)}]), "give a dict with category, and bbox or mask"),
        (("a", PICTURE, box(1, 1, 2, 2, masc=MASK)), "unknown key 'masc': did you mean mask?"),
        (("a", PICTURE, [{"category": "cat", "mask": MASK.T}]), "shape (48, 32), the image is [H, W] = (32, 48)"),
        (("a", PICTURE, [{"category": "cat", "mask": [[1, 0], [1]]}]), "a mask of cat is not an array: give an"),
        (("a", PICTURE, [{"category": "cat", "mask": ~MASK & MASK}]), "a mask of cat has no pixel"),
        (("a", PICTURE, box(1, 1, 2, 2, predicted_iou=2.0)), "predicted_iou 2 is not from 0 to 1"),
        (("a", PICTURE, [Instance(7, (1, 1, 2, 2), None)]), "category_id 7 is not the id of a class"),
    ],
)
def test_wrong_input_names_the_sample_and_the_remedy(tmp_path: Path, arguments: tuple, message: str) -> None:
    metadata = arguments[-1] if isinstance(arguments[-1], dict) else {}
    with DatasetWriter(tmp_path / "pets", ["cat", "dog"]) as writer:
        writer.add_image("first", PICTURE)
        with pytest.raises(DatasetError) as caught:
            writer.add_image(*arguments[: len(arguments) - bool(metadata)], **metadata)
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path}/pets: sample {arguments[0]}: ")
        assert "\n" not in str(caught.value)
    # What was refused is not in the dataset.
    assert [one.image_id for one in samples(str(tmp_path / "pets"), "train")] == ["first"]


open_writer: Any = DatasetWriter
wrong_class: Any = Category  # for calls that are wrong on purpose, whose types are not checked


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda root: open_writer(root, "cat"), "classes is 'cat': give a list of names"),
        (lambda root: open_writer(root, (3 for _ in "ab")), "give a list of names"),
        (lambda root: open_writer(root, [""]), "class 1 has the name '': give each class a name"),
        (lambda root: open_writer(root, [wrong_class(1, 5, "")]), "name of a category is 5, not of type str: give"),
        (lambda root: open_writer(root, [wrong_class("1", "cat", "")]), "the id of class 'cat' is '1': give a"),
        (lambda root: open_writer(root, ["cat", "cat"]), "class 'cat' or its id 1 occurs more than once"),
        (lambda root: open_writer(root, [Category(0, "cat", "")]), "class 'cat' has the id 0: ids are from 1"),
        (lambda root: open_writer(root, ["cat"], samples_per_shard=0), "samples_per_shard is 0"),
        (lambda root: open_writer(root, ["cat"], seed="x"), "seed is 'x': give a whole number"),
        (lambda root: open_writer("s3://", ["cat"]), "it names no bucket"),
        (lambda root: open_writer("/proc/x", ["cat"]).__enter__(), "choose another root"),
        (lambda root: open_writer(root, ["cat"]).add_image("a", PICTURE), "can only be added within `with"),
        (lambda root: open_writer(root, iter(["cat"])).__enter__().__exit__(None, None, None), "no sample was added"),
        (lambda root: open_writer(root, CATEGORIES).__enter__().add(sample(1), "dev"), "split is 'dev': give one of"),
    ],
)
def test_wrong_use_is_one_line_with_a_remedy(tmp_path: Path, call: Callable[[str], Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        call(str(tmp_path / "pets"))
    assert message in str(caught.value)
    assert not (tmp_path / "pets").exists()
