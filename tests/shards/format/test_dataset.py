import json
from dataclasses import replace

import pytest

from shards.common.errors import DatasetError
from shards.format.accounts import Account, write_accounts
from shards.format.dataset import Category, open_dataset
from shards.format.dataset_writer import finish_dataset
from shards.format.shard_tar import pack_shard
from shards.storage.location import Location
from tests.support import CATEGORIES, sample, write_dataset

SHARD = {"path": "train/000000.tar", "split": "train", "samples": 1, "nbytes": 10240, "sha256": "0" * 64}


def test_an_opened_dataset_has_what_was_written(dataset):
    assert (dataset.categories, dataset.splits) == (CATEGORIES, ("train", "val"))
    shards = dataset.info.shards
    assert [shard.path for shard in shards] == [*(f"train/{n:06d}.tar" for n in range(5)), "val/000000.tar"]
    index = dataset.index("train")
    assert len(index) == 40
    counts = [index.counts(name, CATEGORIES) for name in ("images", "instances", "masks")]
    assert counts == [{1: 40, 2: 20}, {1: 40, 2: 20}, {1: 40, 2: 0}]
    train = json.loads((dataset.root / "dataset.json").read())["splits"]["train"]
    assert train == {"shards": 5, "samples": 40, "nbytes": sum(shard.nbytes for shard in shards[:5])}
    with pytest.raises(DatasetError, match="no split 'test': it has train, val"):
        dataset.index("test")


def test_a_root_without_dataset_json_is_an_unfinished_build_and_one_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"there is no dataset.json.*run the same command again"):
        open_dataset(str(tmp_path))
    for text in ("{", "[" * 100_000, "9" * 5000):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(DatasetError, match="not JSON"):
            open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "coco"}, "not a maskstream dataset"),
        ({"version": 4}, "format version 4, this release reads versions 1 to 3: upgrade maskstream"),
        ({"classes": [{"id": 1}]}, "damaged"),
        ({"classes": [{"id": 1, "name": None, "mid": ""}]}, "name of a category is None, not of type str"),
        ({"classes": [{"id": 10**12, "name": "a", "mid": ""}]}, "id of a category is 1000000000000: ids are from 1 to"),
        ({"classes": [{"id": 1, "name": "\ud800", "mid": ""}]}, r"is '\\ud800', which is not valid Unicode"),
        ({"shards": [3]}, "a shard is 3, not an object of path, split, samples, nbytes, sha256"),
        ({"shards": [SHARD | {"nbytes": 1.5}]}, "nbytes of a shard is 1.5, not of type int"),
        ({"shards": [SHARD | {"nbytes": -5}]}, "'train/000000.tar' has 1 samples and -5 bytes"),
        ({"shards": [SHARD | {"split": "foo"}]}, "split of a shard is 'foo', not one of train, val, test"),
        *(
            ({"shards": [SHARD | {"path": path}]}, "path of a shard is .*: it must be under the dataset")
            for path in (
                "../train/000000.tar",
                "/etc/000000.tar",
                "train//0.tar",
                "",
                "s3://x/0.tar",
                "train/\0.tar",
                "train/\\..\\0.tar",
            )
        ),
        ({"plan": "\ud800"}, r"plan is '\\ud800', not a text"),
        ({"index": {"path": "index.parquet", "sha256": "0" * 64}}, "the two files are not of one build"),
    ],
)
def test_a_wrong_dataset_json_is_refused(dataset, tmp_path, change, message):
    (tmp_path / "index.parquet").write_bytes((dataset.root / "index.parquet").read())
    value = json.loads((dataset.root / "dataset.json").read())
    (tmp_path / "dataset.json").write_text(json.dumps(value | change))
    with pytest.raises(DatasetError, match=message):
        open_dataset(str(tmp_path))


def test_finish_dataset_sorts_classes_and_refuses_rows_that_contradict_shards(tmp_path):
    packed = pack_shard([sample(0), sample(1)], split="train", path="train/000000.tar")
    root = Location(str(tmp_path))
    with pytest.raises(DatasetError, match="has 2 samples, the index 1"):
        finish_dataset(root, packed.rows[:1], [packed.shard], CATEGORIES)
    with pytest.raises(DatasetError, match="occurs twice"):
        finish_dataset(root, [packed.rows[0], packed.rows[0]], [packed.shard], CATEGORIES)
    with pytest.raises(DatasetError, match="not a shard of this dataset"):
        finish_dataset(root, packed.rows, [], CATEGORIES)
    assert not (tmp_path / "dataset.json").exists()
    assert finish_dataset(root, packed.rows, [packed.shard], CATEGORIES[::-1]).categories == CATEGORIES


def test_a_dataset_prints_as_one_line(dataset):
    root = dataset.root
    assert repr(dataset) == f"Dataset('{root}', classes: Person, Car; train: 40 samples, val: 7 samples)"
    part = repr(dataset.select(classes=["Car"], fraction=0.5))
    assert "classes: Car; before selection train: 40 samples, val: 7 samples; selected: samples of these c" in part
    assert part.endswith("samples of these classes, fraction 0.5 (seed 0))")
    assert repr(dataset.select(classes=["Car"])).endswith("selected: samples of these classes)")
    assert repr(dataset.select(fraction=0.5, seed=2)).endswith("selected: all samples, fraction 0.5 (seed 2))")
    many = replace(dataset.info, categories=tuple(Category(number, f"C{number}", "") for number in range(1, 9)))
    assert "classes: C1, C2, C3, C4, C5 and 3 more;" in repr(replace(dataset, info=many))
    assert repr(dataset.index("train")) == "Index(40 samples in 5 shards)"


def test_to_pandas_has_a_column_per_class(dataset):
    frame = dataset.to_pandas("train")
    assert list(frame) == ["image_id", "shard", "offset", "nbytes", "crc32", "width", "height", "Person", "Car"]
    assert frame["image_id"].tolist() == [f"{n:016x}" for n in range(40)]
    assert frame["shard"].tolist() == [f"train/{n // 8:06d}.tar" for n in range(40)]
    assert frame[["Person", "Car"]].to_numpy().tolist() == [[1, 0], [1, 1]] * 20
    cars = dataset.select(classes=["Car"]).to_pandas("train")
    assert cars["image_id"].tolist() == [f"{n:016x}" for n in range(1, 40, 2)]
    assert "Person" not in cars
    renamed = replace(dataset.info, categories=(Category(1, "width", ""), Category(2, "Car", "")))
    assert list(replace(dataset, info=renamed).to_pandas("val"))[-2:] == ["width (1)", "Car"]


def test_accounts_are_a_data_frame_or_an_error(tmp_path):
    dataset = write_dataset(tmp_path, {"train": [sample(0)]})
    with pytest.raises(DatasetError, match=r"there is no accounts\.parquet"):
        dataset.accounts()
    missing = Account("image", "train", "a", "", "a.jpg", "image-missing")
    (tmp_path / "accounts.parquet").write_bytes(write_accounts([missing]))
    assert dataset.accounts()[["image_id", "status"]].to_numpy().tolist() == [["a", "image-missing"]]
    (tmp_path / "accounts.parquet").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"accounts.parquet: damaged \("):
        dataset.accounts()
