import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.s3server import S3Server
from shards.format import rle
from shards.format.dataset import open_dataset
from shards.format.shard_tar import pack_shard
from shards.inspect import shard_scanner
from shards.inspect.cli import main
from shards.inspect.shard_check import Fault
from shards.inspect.verify import Verification
from shards.storage.location import Location
from tests.support import edit_index, edit_info, sample, write_dataset, write_spoilt

FIRST, SECOND = "train/000000.tar", "train/000001.tar"
KEY = f"{1:016x}"
Capture = pytest.CaptureFixture[str]
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    numbers = {"train": range(16), "val": range(16, 19)}
    write_dataset(root, {split: [sample(n) for n in own] for split, own in numbers.items()}, per_shard=6)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def faults(root: Path | str) -> list[str]:
    return [str(fault) for part in Verification(Location(str(root))).run() for fault in part.faults]


def truncate(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_faults_are_lines_or_json_and_set_the_status(root: Path, capsys: Capture) -> None:
    assert main([str(root), "--verify"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("no fault: 19 samples in 4 shards, 28 boxes, 19 masks, ")
    assert captured.err == ""
    (root / FIRST).unlink()
    assert main([str(root), "--verify"]) == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"{FIRST}: cannot be read: {root / FIRST}: there is no such object"
    assert last.startswith("1 fault")
    assert main([str(root), "--verify", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert (value["faults"][0]["file"], len(value["faults"]), value["samples"]) == (FIRST, 1, 13)
    assert str(Fault("a", "box \n\x1b[2J")) == r"a: box \n\x1b[2J"


@pytest.mark.parametrize("where", [0.0, 0.3, 0.97])
def test_a_flipped_byte_is_a_fault_of_its_sample_only(root: Path, where: float) -> None:
    """In a header, a picture or a JSON member: the hash of the shard and that of the sample are wrong."""
    row = open_dataset(str(root)).table.to_pylist()[2]
    flip(root / FIRST, row["offset"] + int(where * row["nbytes"]))
    first, *others = faults(root)
    assert first.startswith(f"{FIRST}: sha256 is ")
    assert any(f"sample {row['image_id']} at offset {row['offset']}: " in line for line in others)
    assert all(f"at offset {row['offset']}: " in line for line in others)


@pytest.mark.parametrize("sample_and_bytes", [(4, 700), (4, 0), (0, 0)])  # in a member, between samples, to nothing
def test_a_truncated_shard(root: Path, sample_and_bytes: tuple[int, int]) -> None:
    rows = [row for row in open_dataset(str(root)).table.to_pylist() if row["shard"] == FIRST]
    number, more = sample_and_bytes
    length, size = rows[number]["offset"] + more, (root / FIRST).stat().st_size
    truncate(root / FIRST, length)
    found = faults(root)
    assert f"{FIRST}: at offset {length}: it ends after {length} bytes, dataset.json says {size}: truncated" in found
    for place, row in enumerate(rows):
        blamed = any(f"sample {row['image_id']} at offset {row['offset']}: " in line for line in found)
        assert blamed == (place >= number)


def test_a_shard_that_should_be_longer_than_any_disk_is_a_fault(root: Path) -> None:
    edit_info(root, lambda info: info["shards"][0].update(nbytes=2**63))
    assert any(f"dataset.json says {2**63}: truncated" in line for line in faults(root))


def test_swapped_shards(root: Path) -> None:
    (root / FIRST).rename(root / "kept")
    (root / SECOND).rename(root / FIRST)
    (root / "kept").rename(root / SECOND)
    assert faults(root) == [
        f"{one}: it holds the bytes of {other}: swapped, or copied over it"
        for one, other in ((FIRST, SECOND), (SECOND, FIRST))
    ]


def test_a_shard_of_another_build(root: Path) -> None:
    """Samples that only the index or only the shard has are faults, and no others."""
    (root / FIRST).write_bytes(pack_shard([sample(n) for n in (0, 77)], split="train", path=FIRST).data)
    found = faults(root)
    assert any(f"sample {77:016x} at offset" in line and "the index does not have it here" in line for line in found)
    assert sum("the shard does not hold it, the index does" in line for line in found) == 5
    assert not any(f"{0:016x}" in line for line in found)


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda rows: rows[3].update(offset=512), "the index says offset 512, the shard has "),
        (lambda rows: rows[3].update(nbytes=1024), "the index says nbytes 1024, the shard has "),
        (lambda rows: rows[3].update(crc32=0xDEADBEEF), ", the index says deadbeef"),
        (lambda rows: rows[3].update(width=49), "the index says width 49, the shard has 48"),
        (lambda rows: rows[3].update(split="val"), "the index says split val, the shard has train"),
        (lambda rows: rows[3].update(masks=[2, 0]), "the index says masks [2, 0], the shard has [1, 0]"),
        (lambda rows: rows[3].update(image_id="other"), "the shard does not hold it, the index does"),
        (lambda rows: rows.pop(3), "dataset.json says 6 samples, the index has 5"),
        (lambda rows: rows.__setitem__(slice(0, 2), rows[1::-1]), "are not in the order of the shards and offsets"),
    ],
)
def test_a_wrong_index(root: Path, edit: Callable[[list[dict[str, Any]]], Any], fault: str) -> None:
    edit_index(root, edit)
    found = faults(root)
    assert any(fault in line for line in found)
    assert all(FIRST in line for line in found)  # no other shard is blamed
    edit_info(root, lambda info: info["index"].update(sha256=64 * "0"))
    assert sorted(faults(root))[0].startswith("index.parquet: sha256 is ")


def test_index_rows_of_an_unknown_shard_or_of_none(root: Path) -> None:
    edit_index(root, lambda rows: rows.append(rows[0] | {"shard": "train/000009.tar"}))
    assert faults(root) == [
        "index.parquet: 1 row of train/000009.tar, which is not a shard of dataset.json",
        f"index.parquet: sample {0:016x}: occurs in 2 rows",
    ]
    edit_index(root, lambda rows: rows.clear())
    assert [line.partition(": ")[2] for line in faults(root)] == [
        f"dataset.json says {number} samples, the index has 0" for number in (6, 6, 4, 3)
    ]


def test_an_unreadable_index_is_one_fault_and_the_rest_is_checked(root: Path) -> None:
    (root / "index.parquet").write_bytes(b"PAR1 and no more")
    first, second = faults(root)
    assert first.startswith("index.parquet: sha256 is ")
    assert second.startswith("index.parquet: is not an index in Parquet")
    (root / "index.parquet").unlink()
    flip(root / FIRST, -1)  # after the end of the tar
    edit_info(root, lambda info: info["shards"][1].update(samples=5))
    _, first, *others = faults(root)  # after the number of samples of the split in dataset.json
    assert first.startswith("index.parquet: cannot be read: ")
    assert [line.partition(": ")[0] for line in others] == [FIRST, FIRST, SECOND]
    assert others[0].startswith(f"{FIRST}: sha256 is ")
    assert "the tar ends here, but more follows" in others[1]
    assert others[-1].endswith("dataset.json says 5 samples, the shard has 6")


def test_an_extra_shard(root: Path) -> None:
    extra = ["train/old/kept/000000.tar", "test/000000.tar"]
    for path in extra:
        (root / path).parent.mkdir(parents=True)
        shutil.copy(root / FIRST, root / path)
    assert faults(root) == [f"{path}: is not in dataset.json: of another build?" for path in extra]


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda info: info["splits"]["train"].update(samples=999), "dataset.json: split train is {"),
        (lambda info: info["splits"].pop("val"), "its shards are of train, val"),
        (lambda info: info.update(splits={"nonsense": 3}), "splits are {'nonsense': 3}, its shards are of train, val"),
        (
            lambda info: info["shards"][0].update(path="train/x.tar"),
            "train/x.tar is not a shard's path, train/ and six",
        ),
    ],
)
def test_values_of_dataset_json_that_readers_do_not_use(root: Path, edit: Edit, fault: str) -> None:
    edit_info(root, edit)
    assert any(fault in line for line in faults(root))


def rle_of(**values: object) -> Edit:
    return lambda value: value["annotations"][0]["segmentation"].update(values)


def box(number: int, **values: object) -> Edit:
    return lambda value: value["annotations"][number].update(values)


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (rle_of(counts="PPPP1"), "the RLE has runs of "),
        (rle_of(size=[48, 32]), "annotation 0 (box b0): the RLE is of 32x48, the image 48x32"),
        (box(0, segmentation=rle.encode(np.zeros((32, 48))).to_json()), "the RLE is empty"),
        (box(0, bbox=[40.0, 20.0, 8.0, 12.0]), "mostly outside its bbox [40, 20, 8, 12]"),
        (box(0, predicted_iou=-3.5), "predicted_iou -3.5 is not from 0 to 1"),
        (box(1, bbox=[40.0, 2.0, 20.0, 25.0]), "bbox [40, 2, 20, 25] leaves the image"),
        (box(1, bbox=[4.0, 2.0, 0.0, 25.0]), "bbox [4, 2, 0, 25] is empty"),
        (box(1, bbox=[10**400, 0, 1, 1]), "is not in the shard format (OverflowError"),
        (box(1, category_id=3), "category_id 3 is not the id of a class"),
        (lambda v: v["verified_present"].append(9), "verified_present has 9"),
        (lambda v: v["verified_present"].append(1), "verified_present has 1 more than once"),
        (lambda v: v["verified_absent"].append(1), "class 1 is verified as present and as absent"),
        (lambda v: v.update(rotation=-90), "rotation is -90, not one of 0, 90, 180, 270"),
        (lambda v: v.update(width=47), "is 48x32, "),
        (lambda v: v.update(image_id="another"), "is not the canonical JSON of the format, or of another image"),
        (lambda v: v.pop("title"), "is not in the shard format (KeyError('title'))"),
    ],
)
def test_contents_that_the_format_does_not_allow(tmp_path: Path, edit: Edit, fault: str) -> None:
    write_spoilt(tmp_path, edit)
    found = faults(tmp_path)
    assert any(fault in line for line in found), found
    assert all(f"{FIRST}: sample {1:016x} at offset 0: " in line for line in found)


@pytest.mark.parametrize(
    ("order", "header", "fault"),
    [
        ([1, 0], {}, f"a member '{KEY}.json' is at byte 0, where <key>.jpg or .png should be"),
        ([0], {}, f"the end of the tar is at byte 1536, where {KEY}.json should be"),
        ([0, 1], {"uname": "root"}, "has another mode, time or owner"),
    ],
)
def test_members_in_another_order_or_form(tmp_path: Path, order: list[int], header: dict[str, Any], fault: str) -> None:
    write_dataset(tmp_path, {"train": [sample(1)]})
    with tarfile.open(tmp_path / FIRST) as tar:
        members = [(member.replace(**header), tar.extractfile(member)) for member in tar]
        contents = [file.read() for _, file in members if file]
    with tarfile.open(tmp_path / FIRST, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in order:
            tar.addfile(members[number][0], io.BytesIO(contents[number]))
    found = faults(tmp_path)
    assert any(fault in line for line in found), found


@pytest.mark.parametrize("chunk", [512, 700])
def test_a_shard_of_many_chunks(root: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_scanner, "CHUNK", chunk)
    assert faults(root) == []
    truncate(root / FIRST, 4000)
    assert sum("truncated" in line for line in faults(root)) == 1
    with (root / SECOND).open("ab") as file:
        file.write(bytes(5000))
    assert sum("it is longer than the " in line for line in faults(root)) == 1


def test_a_bucket_and_the_same_over_http(s3: S3Server, bucket: str, root: Path, capsys: Capture) -> None:
    """Over http, which has no listing, an extra shard is not found and a note says so."""

    def without_reasons(lines: list[str]) -> list[str]:
        return [line.partition(": cannot be read: ")[0] for line in lines]

    rows = open_dataset(str(root)).table.to_pylist()
    flip(root / FIRST, rows[1]["offset"] + 600)
    truncate(root / SECOND, rows[8]["offset"] + 700)
    (root / "val/000000.tar").unlink()
    (root / "train/000007.tar").write_bytes(b"")
    s3.upload(root, bucket)
    first, *others = without_reasons(faults(root))
    assert first == "train/000007.tar: is not in dataset.json: of another build?"
    assert without_reasons(faults(f"s3://{bucket}")) == [first, *others]
    address = f"{s3.endpoint_url}/{bucket}"
    assert main([address, "--verify"]) == 1
    captured = capsys.readouterr()
    assert without_reasons(captured.out.splitlines()[:-1]) == others
    assert captured.err.startswith(f"inspect-shards: note: {address}: http has no listing: ")
    assert captured.err.count("\n") == 1
