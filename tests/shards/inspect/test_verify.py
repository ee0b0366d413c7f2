"""`inspect-shards --verify` finds what is wrong, and nothing where nothing is."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.s3server import S3Server
from shards.format import rle
from shards.format.dataset import finish_dataset, open_dataset
from shards.format.index_schema import INDEX_SCHEMA
from shards.format.shard_tar import pack_shard
from shards.inspect import shard_scanner as walk
from shards.inspect.cli import main
from shards.inspect.verify import Verification
from shards.storage.location import Location
from tests.support import CATEGORIES, sample, write_dataset, write_spoilt

FIRST = "train/000000.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_dataset(
        root, {"train": [sample(n) for n in range(16)], "val": [sample(n) for n in range(16, 19)]}, per_shard=6
    )
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def faults(root: Path | str) -> list[str]:
    return [str(fault) for part in Verification(Location(str(root))).run() for fault in part.faults]


def change(path: Path, edit: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def rewrite_index(root: Path, edit: Callable[[list[dict[str, Any]]], Any], *, honest: bool = True) -> None:
    """Change rows of the index, and with `honest` the sha256 that dataset.json says of it."""
    rows = pq.read_table(root / "index.parquet").to_pylist()
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), root / "index.parquet")
    if honest:
        info = json.loads((root / "dataset.json").read_text())
        info["index"]["sha256"] = hashlib.sha256((root / "index.parquet").read_bytes()).hexdigest()
        (root / "dataset.json").write_text(json.dumps(info))


def rewrite_info(root: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    info = json.loads((root / "dataset.json").read_text())
    edit(info)
    (root / "dataset.json").write_text(json.dumps(info))


def test_a_whole_dataset_has_no_fault(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(whole), "--verify"]) == 0
    captured = capsys.readouterr()
    assert "no fault: 19 samples in 4 shards" in captured.out
    assert "28 boxes, 19 masks" in captured.out
    assert captured.err == ""


def test_every_fault_is_a_line_and_the_status_tells(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / FIRST).unlink()
    assert main([str(root), "--verify"]) == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"{FIRST}: cannot be read: {root / FIRST}: there is no such object"
    assert last.startswith("1 fault")
    assert main([str(root), "--verify", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [fault["file"] for fault in told["faults"]] == [FIRST]
    assert told["samples"] == 13


@pytest.mark.parametrize("where", [0.0, 0.3, 0.62, 0.97])
def test_a_flipped_byte(root: Path, where: float) -> None:
    """In a header, a picture or a JSON member: the shard's and the sample's hashes are both told."""
    row = open_dataset(str(root)).table.to_pylist()[2]
    place = row["offset"] + int(where * row["nbytes"])
    change(root / FIRST, lambda data: data.__setitem__(place, data[place] ^ 0x10))
    found = faults(root)
    assert sum(line.startswith(f"{FIRST}: sha256 is ") for line in found) == 1
    sample_lines = [line for line in found if f"sample {row['image_id']} at offset {row['offset']}: " in line]
    assert sample_lines
    # Nothing else is blamed: the samples before and after it are read.
    assert len(found) == len(sample_lines) + 1 + sum(f"{FIRST}: at offset {row['offset']}: " in line for line in found)


def test_a_flipped_byte_in_the_zeros_at_the_end(root: Path) -> None:
    change(root / FIRST, lambda data: data.__setitem__(-1, 1))
    first, second = faults(root)
    assert "sha256 is" in first
    assert "the tar ends here, but more follows" in second


@pytest.mark.parametrize("cut", ["in a member", "between samples", "to nothing"])
def test_a_truncated_shard(root: Path, cut: str) -> None:
    rows = [row for row in open_dataset(str(root)).table.to_pylist() if row["shard"] == FIRST]
    length = {"in a member": rows[4]["offset"] + 700, "between samples": rows[4]["offset"], "to nothing": 0}[cut]
    whole_length = (root / FIRST).stat().st_size
    change(root / FIRST, lambda data: data.__delitem__(slice(length, None)))
    found = faults(root)
    assert (
        f"{FIRST}: at offset {length}: it ends after {length} bytes, dataset.json says {whole_length}: truncated"
        in found
    )
    lost = rows[0 if cut == "to nothing" else 4 :]
    for row in lost:
        assert any(f"sample {row['image_id']} at offset {row['offset']}: " in line for line in found)
    assert not any(row["image_id"] in line for row in rows if row not in lost for line in found)


def test_swapped_shards(root: Path) -> None:
    one, other = root / FIRST, root / "train/000001.tar"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    assert faults(root) == [
        "train/000000.tar: it holds the bytes of train/000001.tar: swapped, or copied over it",
        "train/000001.tar: it holds the bytes of train/000000.tar: swapped, or copied over it",
    ]


def test_a_shard_of_another_build(root: Path) -> None:
    """Each sample that the index has and the shard has not is told, and the other way round."""
    (root / FIRST).write_bytes(pack_shard([sample(n) for n in (0, 77)], split="train", path=FIRST).data)
    found = faults(root)
    assert any(f"sample {77:016x} at offset" in line and "the index does not have it here" in line for line in found)
    assert sum("the shard does not hold it, the index does" in line for line in found) == 5
    assert not any(f"{0:016x}" in line for line in found)


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("offset", 512, "the index says offset 512, the shard has "),
        ("nbytes", 1024, "the index says nbytes 1024, the shard has "),
        ("crc32", 0xDEADBEEF, ", the index says deadbeef"),
        ("width", 49, "the index says width 49, the shard has 48"),
        ("split", "val", "the index says split val, the shard has train"),
        ("masks", [2, 0], "the index says masks [2, 0], the shard has [1, 0]"),
        ("image_id", "other", "the shard does not hold it, the index does"),
    ],
)
def test_a_wrong_index_row(root: Path, column: str, value: object, told: str) -> None:
    rewrite_index(root, lambda rows: rows[3].__setitem__(column, value))
    found = faults(root)
    assert any(told in line for line in found)
    assert all(FIRST in line for line in found)


def test_index_rows_as_a_whole(root: Path) -> None:
    rewrite_index(root, lambda rows: rows.pop(3))
    assert any(f"{FIRST}: dataset.json says 6 samples, the index has 5" in line for line in faults(root))
    rewrite_index(root, lambda rows: rows.append(rows[0] | {"shard": "train/000009.tar"}))
    found = faults(root)
    assert "index.parquet: 1 row of train/000009.tar, which is not a shard of dataset.json" in found
    assert any(f"index.parquet: sample {0:016x}: occurs in 2 rows" in line for line in found)
    rewrite_index(root, lambda rows: rows.__setitem__(slice(0, 2), rows[1::-1]))
    assert any("not in the order of the shards and offsets" in line for line in faults(root))


def test_an_index_of_another_build_or_none_at_all(root: Path) -> None:
    rewrite_index(root, lambda rows: rows[0].__setitem__("height", 31), honest=False)
    found = faults(root)
    assert found[0].startswith("index.parquet: sha256 is ")
    assert "the index says height 31, the shard has 32" in found[1]


def test_an_index_that_cannot_be_read_is_told_once_and_not_for_each_sample(root: Path) -> None:
    (root / "index.parquet").write_bytes(b"PAR1 and no more")
    first, second = faults(root)
    assert first.startswith("index.parquet: sha256 is ")
    assert second.startswith("index.parquet: is not an index in Parquet")
    (root / "index.parquet").unlink()
    place = (root / FIRST).stat().st_size - 1
    change(root / FIRST, lambda data: data.__setitem__(place, 1))
    # What can be found without it is found.
    first, *others = faults(root)
    assert first.startswith("index.parquet: cannot be read: ")
    assert [line.partition(": ")[0] for line in others] == [FIRST, FIRST]


def test_a_shard_of_which_the_index_has_nothing_is_told_once(root: Path) -> None:
    rewrite_index(root, lambda rows: rows.__delitem__(slice(0, 6)))
    assert faults(root) == [f"{FIRST}: dataset.json says 6 samples, the index has 0"]
    rewrite_index(root, lambda rows: rows.clear())
    assert [line.partition(": ")[2] for line in faults(root)] == [
        f"dataset.json says {number} samples, the index has 0" for number in (6, 6, 4, 3)
    ]


def test_without_an_index_the_number_of_samples_is_that_of_dataset_json(root: Path) -> None:
    (root / "index.parquet").unlink()
    rewrite_info(root, lambda info: info["shards"][0].update(samples=5))
    assert f"{FIRST}: dataset.json says 5 samples, the shard has 6" in faults(root)


def test_an_extra_shard(root: Path) -> None:
    (root / "test").mkdir()
    shutil.copy(root / FIRST, root / "test" / "000000.tar")
    (root / "train" / "old" / "kept").mkdir(parents=True)
    shutil.copy(root / FIRST, root / "train" / "old" / "kept" / "000000.tar")
    assert faults(root) == [
        "train/old/kept/000000.tar: is not in dataset.json: of another build?",
        "test/000000.tar: is not in dataset.json: of another build?",
    ]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda info: info["splits"]["train"].update(samples=999), "dataset.json: split train is {"),
        (lambda info: info["splits"].pop("val"), "its shards are of train, val"),
        (lambda info: info.update(splits={"nonsense": 3}), "splits are {'nonsense': 3}, its shards are of train, val"),
        (lambda info: info.pop("splits"), "dataset.json: splits are None, its shards are of train, val"),
        (lambda info: info["shards"][0].update(path="../x.tar"), "../x.tar is not a shard's path, train/ and six"),
    ],
)
def test_what_readers_leave_alone_in_dataset_json(root: Path, edit: Callable[[dict[str, Any]], Any], told: str) -> None:
    rewrite_info(root, edit)
    assert any(told in line for line in faults(root))


def test_columns_of_another_type(root: Path) -> None:
    table = pq.read_table(root / "index.parquet")
    place = INDEX_SCHEMA.get_field_index("offset")
    pq.write_table(table.set_column(place, "offset", table["offset"].cast(pa.float64())), root / "index.parquet")
    assert "index.parquet: column offset is double, not int64: build the dataset again" in faults(root)


def spoilt(root: Path, edit: Callable[[dict[str, Any]], Any]) -> list[str]:
    """The faults of a dataset whose JSON member was changed, and everything else made to agree with that."""
    write_spoilt(root, edit)
    return faults(root)


def test_an_rle_of_the_wrong_size(tmp_path: Path) -> None:
    def edit(value: dict[str, Any]) -> None:
        value["annotations"][0]["segmentation"] = rle.encode(np.ones((48, 32))).to_json()

    [line] = spoilt(tmp_path, edit)
    assert line == f"{FIRST}: sample {1:016x} at offset 0: annotation 0 (box b0): the RLE is of 32x48, the image 48x32"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v["annotations"][0]["segmentation"].update(counts="PPPP1"), "the RLE has runs of "),
        (lambda v: v["annotations"][0]["segmentation"].update(counts="abc\x01"), "the RLE cannot be decoded"),
        (lambda v: v["annotations"][0]["segmentation"].update(counts="P\\o"), "the RLE cannot be decoded"),
        (
            lambda v: v["annotations"][0].update(segmentation=rle.encode(np.zeros((32, 48))).to_json()),
            "the RLE is empty",
        ),
        (
            lambda v: v["annotations"][0].update(bbox=[40.0, 20.0, 8.0, 12.0]),
            "mostly outside of its bbox [40, 20, 8, 12]",
        ),
        (lambda v: v["annotations"][1].update(bbox=[40.0, 2.0, 20.0, 25.0]), "bbox [40, 2, 20, 25] leaves the image"),
        (lambda v: v["annotations"][1].update(bbox=[4.0, 2.0, 0.0, 25.0]), "bbox [4, 2, 0, 25] is empty"),
        (lambda v: v["annotations"][1].update(bbox=[4.0, 2.0]), "is not in the shard format"),
        (lambda v: v["annotations"][1].update(category_id=3), "category_id 3 is not the id of a class"),
        (lambda v: v["annotations"][1].update(category_id=float("inf")), "is not in the shard format (OverflowError"),
        (lambda v: v["annotations"][1].update(bbox=[10**400, 0, 1, 1]), "is not in the shard format (OverflowError"),
        (lambda v: v["verified_present"].append(9), "verified_present has 9"),
        (lambda v: v["verified_present"].append(1), "verified_present has 1 more than once"),
        (lambda v: v["verified_absent"].append(1), "class 1 is verified as present and as absent"),
        (lambda v: v.update(rotation=45), "rotation is 45, not one of 0, 90, 180, 270"),
        (lambda v: v.update(rotation=-90), "rotation is -90, not one of 0, 90, 180, 270"),
        (lambda v: v["annotations"][0].update(predicted_iou=-3.5), "predicted_iou -3.5 is not from 0 to 1"),
        (lambda v: v.update(width=47), "is 48x32, "),
        (lambda v: v.update(image_id="another"), "is not the canonical JSON of the format, or of another image"),
        (lambda v: v.update(remark="new"), "is not the canonical JSON of the format"),
        (lambda v: v.pop("title"), "is not in the shard format (KeyError('title'))"),
    ],
)
def test_contents_that_the_format_does_not_allow(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    found = spoilt(tmp_path, change)
    assert any(told in line for line in found), found
    assert all(f"{FIRST}: sample {1:016x} at offset 0: " in line for line in found)


def test_members_in_another_order_or_form(tmp_path: Path) -> None:
    def dataset(names: list[str], **header: Any) -> list[str]:
        packed = pack_shard([sample(1)], split="train", path=FIRST)
        buffer = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(packed.data)) as old,
            tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new,
        ):
            for name in names:
                member = old.getmember(f"{1:016x}.{name}")
                for attribute, value in header.items():
                    setattr(member, attribute, value)
                new.addfile(member, old.extractfile(f"{1:016x}.{name}" if "name" not in header else member))
        shard = replace(
            packed.shard, nbytes=len(buffer.getvalue()), sha256=hashlib.sha256(buffer.getvalue()).hexdigest()
        )
        (Location(str(tmp_path)) / FIRST).write(buffer.getvalue())
        finish_dataset(Location(str(tmp_path)), packed.rows, [shard], CATEGORIES)
        return faults(tmp_path)

    key = f"{1:016x}"
    assert any(f"a member '{key}.json' is at byte 0, where <key>.jpg should be" in f for f in dataset(["json", "jpg"]))
    assert any(f"where {key}.json should be" in f and "the end of the tar" in f for f in dataset(["jpg"]))
    assert any(f"a member '{key}.json'" in f for f in dataset(["jpg", "json", "json"]))
    assert any("has another mode, time or owner" in f for f in dataset(["jpg", "json"], mtime=1))
    assert any("has another mode, time or owner" in f for f in dataset(["jpg", "json"], uname="root"))


@pytest.mark.parametrize("chunk", [512, 700, 4096])
def test_a_shard_of_many_chunks(root: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "CHUNK", chunk)
    assert faults(root) == []
    change(root / FIRST, lambda data: data.__delitem__(slice(4000, None)))
    assert sum("truncated" in line for line in faults(root)) == 1
    change(root / "train/000001.tar", lambda data: data.extend(bytes(5000)))
    assert sum("it is longer than the " in line for line in faults(root)) == 1


def test_from_a_bucket(s3: S3Server, bucket: str, root: Path) -> None:
    rows = open_dataset(str(root)).table.to_pylist()
    change(root / FIRST, lambda data: data.__setitem__(rows[1]["offset"] + 600, 0xAA))
    (root / "train/000001.tar").unlink()
    (root / "train/000007.tar").write_bytes(b"")
    s3.upload(root, bucket)
    found = faults(f"s3://{bucket}")
    assert found[0] == "train/000007.tar: is not in dataset.json: of another build?"
    assert any(
        line.startswith("train/000001.tar: cannot be read: ") and "there is no such object" in line for line in found
    )
    assert any(f"{FIRST}: sample {1:016x} at offset {rows[1]['offset']}: crc32 is " in line for line in found)


def test_over_http(s3: S3Server, bucket: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sound dataset has no fault, and is told to have been looked at without a listing; a spoilt one has all its."""
    s3.upload(root, bucket)
    address = f"{s3.endpoint_url}/{bucket}"
    assert main([address, "--verify"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("no fault: 19 samples in 4 shards, 28 boxes, 19 masks, ")
    assert captured.err.startswith(f"inspect-shards: note: {address}: http has no listing: ")
    assert captured.err.count("\n") == 1

    rows = open_dataset(str(root)).table.to_pylist()
    place = rows[1]["offset"] + 600
    change(root / FIRST, lambda data: data.__setitem__(place, data[place] ^ 0x10))
    whole_length = (root / "train/000001.tar").stat().st_size
    cut = rows[8]["offset"] + 700
    change(root / "train/000001.tar", lambda data: data.__delitem__(slice(cut, None)))
    s3.filesystem().rm(f"{bucket}/val/000000.tar")
    for name in (FIRST, "train/000001.tar"):
        s3.filesystem().pipe_file(f"{bucket}/{name}", (root / name).read_bytes())
    assert main([address, "--verify"]) == 1
    found = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{FIRST}: sha256 is ") for line in found)
    assert any(f"{FIRST}: sample {1:016x} at offset {rows[1]['offset']}: crc32 is " in line for line in found)
    told = f"at offset {cut}: it ends after {cut} bytes, dataset.json says {whole_length}: truncated"
    assert f"train/000001.tar: {told}" in found
    assert [row["image_id"] for row in rows[8:12] if not any(row["image_id"] in line for line in found)] == []
    assert any(line.startswith("val/000000.tar: cannot be read: ") and "no such object" in line for line in found)
    assert not any(str(row["image_id"]) in line for row in rows[2:8] for line in found)


def test_what_is_no_dataset_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--verify"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
