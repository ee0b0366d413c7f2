import hashlib
import io
import json
import subprocess
import tarfile
import zlib

import pytest
import webdataset as wds

from shards.format.shard_tar import pack_shard
from tests.support import sample, write_dataset


def test_the_bytes_are_those_of_webdatasets_writer_and_always_the_same():
    samples = [sample(n) for n in range(9)]
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, user="", group="", mtime=0, encoder=False) as writer:
        for one in samples:
            writer.write({"__key__": one.image_id, **one.to_members()})
    packed = pack_shard(samples, split="train", path="t.tar")
    assert packed.data == buffer.getvalue()
    assert packed == pack_shard(samples, split="train", path="t.tar")
    assert packed.shard.sha256 == hashlib.sha256(packed.data).hexdigest()
    assert packed.shard.nbytes == len(packed.data)


def test_every_range_of_the_index_is_a_readable_tar_of_its_sample():
    samples = [sample(n) for n in range(7)]
    packed = pack_shard(samples, split="train", path="t.tar")
    for row, original in zip(packed.rows, samples, strict=True):
        data = packed.data[row.offset : row.offset + row.nbytes]
        assert zlib.crc32(data) == row.crc32
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert tar.getnames() == [f"{original.image_id}.jpg", f"{original.image_id}.json"]
            assert tar.extractfile(tar.getmembers()[0]).read() == original.image  # type: ignore[union-attr]
    # Consecutive samples are a tar as well.
    run = packed.data[packed.rows[2].offset : packed.rows[4].offset + packed.rows[4].nbytes]
    with tarfile.open(fileobj=io.BytesIO(run)) as tar:
        assert len(tar.getnames()) == 6


def test_the_index_counts_classes_masks_and_groups():
    row = pack_shard([sample(1)], split="train", path="t.tar").rows[0]
    assert (row.classes, row.instances, row.masks, row.groups) == ((1, 2), (1, 1), (1, 0), (0, 0))
    assert (row.width, row.height) == (48, 32)


def test_plain_tar_and_plain_webdataset_read_shards(tmp_path):
    samples = [sample(n) for n in range(6)]
    write_dataset(tmp_path, {"train": samples}, per_shard=4)
    urls = sorted(str(path) for path in (tmp_path / "train").glob("*.tar"))
    assert len(urls) == 2
    listing = subprocess.run(["tar", "tf", urls[1]], capture_output=True, text=True, check=True)
    names = [f"{n:016x}.{extension}" for n in (4, 5) for extension in ("jpg", "json")]
    assert (listing.stdout.split(), listing.stderr) == (names, "")
    read = list(wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "json"))
    assert [key for key, _, _ in read] == [s.image_id for s in samples]
    for (_, picture, value), original in zip(read, samples, strict=True):
        assert picture.size == (original.width, original.height) == (value["width"], value["height"])
        assert len(value["annotations"]) == len(original.instances)


def test_hugging_face_datasets_reads_shards_without_any_mask(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    samples = [sample(n, masks=False) for n in range(8)]
    write_dataset(tmp_path / "data", {"train": samples})
    files = str(tmp_path / "data" / "train" / "*.tar")
    read = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", cache_dir=tmp_path / "cache")
    for row, original in zip(read, samples, strict=True):
        assert (row["__key__"], row["jpg"].size) == (original.image_id, (original.width, original.height))
        stored = json.loads(original.to_members()["json"])
        for annotation, expected in zip(row["json"]["annotations"], stored["annotations"], strict=True):
            for name in ("category_id", "segmentation", "bbox"):
                assert annotation[name] == expected[name]
