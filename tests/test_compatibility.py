"""Shards, orders and checkpoints equal those of earlier releases.

The JSON files in `facts/` are what this code found at commit 59f3854, with the names that its modules had then. All
inputs are generated without an image encoder or a compressor, and are read from fsspec's memory file system, so the
facts depend on nothing but this project.
"""

import contextlib
import hashlib
import io
import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from builder.commands.cli import main as build_shards
from demo.openimages_tables import BoxRow, ImageRecord, write_classes, write_split
from shards.format.dataset import Dataset
from shards.format.sample import Sample
from shards.order.epoch_order import Order, OrderSettings
from shards.order.mixture import Mix, MixedOrder
from shards.storage.location import Location
from shards.stream.streams import ShardStream
from tests import support
from tests.trainer import tiny
from trainer.commands.train import main as train

DTYPES = {"F32": torch.float32, "I64": torch.int64}
MIRROR = "memory://facts/mirror"
LABELS = ("/m/01g317", "/m/04yx4", "/m/0k4j", "/m/0h2r6", "/m/015qff", "/m/01mqdt")

COMMANDS = {
    "quotas": "--per-class 4 --eval-per-class 2 --images-per-shard 4",
    "partition": "--classes Car Person --per-class 5 --eval-per-class 3 --splits partition --partition 0.5 0.25 0.25 "
    "--seed 3 --images-per-shard 3 --all-annotations --min-predicted-iou 0.75 --exact-classes",
    "list": f"--classes Person --images-list {MIRROR}/list.txt --drop occluded",
}

ORDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "narrow": {"lanes": 3, "window": 8},
    "groups by aspect": {"group_by_aspect": True},
    "repeat factors": {"repeat_threshold": 0.3},
    "groups by aspect, repeat factors": {"group_by_aspect": True, "repeat_threshold": 0.3},
}


def number(limit: int, *key: object) -> int:
    """Return a pseudorandom integer below `limit` that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") % limit


def grey_jpeg(width: int, height: int, comment: bytes) -> bytes:
    """Return a grey baseline JPEG: in each block a DC difference of 0 and an end of block, of one bit each."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body

    bits = 2 * -(-width // 8) * -(-height // 8)
    data = bytes(bits // 8) + (bytes([0xFF >> bits % 8]) if bits % 8 else b"")
    one_code = b"\1" + bytes(15) + b"\0"
    head = segment(0xFE, comment) + segment(0xDB, b"\0" + b"\1" * 64)
    head += segment(0xC0, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")
    head += segment(0xC4, b"\x00" + one_code) + segment(0xC4, b"\x10" + one_code)
    return b"\xff\xd8" + head + segment(0xDA, b"\1\1\0\0\x3f\0") + data + b"\xff\xd9"


def stored_png(mask: np.ndarray) -> bytes:
    """Return a PNG of one bit per pixel whose data is stored, not deflated."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    raw = b"".join(b"\0" + row.tobytes() for row in np.packbits(mask, axis=1))
    head = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw, 0)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_mirror(folder: Path) -> None:
    """Write 30 train and 8 validation images in the layout of Open Images; some are missing or damaged."""
    write_classes(folder)
    names = []
    for split, count in (("train", 30), ("validation", 8), ("test", 0)):
        records = sorted((_record(split, n) for n in range(count)), key=lambda record: record.image_id)
        write_split(folder, split, records)
        names += [f"{split}/{record.image_id}" for record in records]
        for n, record in enumerate(records):
            data = grey_jpeg(record.width, record.height, record.image_id.encode())
            if n % 6 != 4:
                Location(f"{MIRROR}/images/{split}/{record.image_id}.jpg").write(data[:90] if n % 11 == 5 else data)
    fsspec.filesystem("memory").put(f"{folder}/", f"{MIRROR}/annotations/", recursive=True)
    Location(f"{MIRROR}/list.txt").write("\n".join([*names[3:11], *names[-3:], "nowhere"]).encode())


def _record(split: str, n: int) -> ImageRecord:
    # An even first digit: the writer deflates the zips of odd ones.
    image_id = "02468ace"[number(8, split, n)] + f"{number(1 << 60, split, n, 'id'):015x}"
    width, height = ((96, 64), (64, 80), (72, 48))[number(3, split, n, "size")]
    rows = tuple(_row(split, n, place, width, height) for place in range(1 + number(3, split, n, "objects")))
    present = tuple(sorted({row.label for row in rows}))
    absent = tuple(label for label in LABELS if label not in present and number(2, split, n, label))
    site = f"https://pictures.example/{image_id}"
    metadata: tuple[str, ...] = (image_id, split, f"{site}.jpg", site, "https://creativecommons.org/licenses/by/2.0/")
    metadata += (f"{site}/author", f"Autor {n} ü", f'Title "{n}", one', "1000", "", "", str(90.0 * (n % 4)))
    return ImageRecord(image_id, width, height, rows, present, absent, metadata)


def _row(split: str, n: int, place: int, width: int, height: int) -> BoxRow:
    key = (split, n, place)
    left, top = number(width // 2, *key, "x"), number(height // 2, *key, "y")
    right, bottom = left + 6 + number(width // 2 - 6, *key, "w"), top + 6 + number(height // 2 - 6, *key, "h")
    scale = (1, 1.5)[number(2, *key, "scale")]
    y, x = np.mgrid[0 : int(height * scale), 0 : int(width * scale)]
    inside = ((2 * x / scale - left - right) / (right - left)) ** 2
    inside = inside + ((2 * y / scale - top - bottom) / (bottom - top)) ** 2
    return BoxRow(
        label=LABELS[number(len(LABELS), *key, "label")],
        box=(left / width, top / height, right / width, bottom / height),
        extremes=((0.0, 0.0),) * 4,
        is_occluded=number(4, *key, "occluded") == 0,
        is_truncated=number(4, *key, "truncated") == 0,
        is_group_of=place == 2,
        box_id=f"{number(1 << 32, *key, 'id'):08x}",
        mask_png=stored_png(inside <= 1) if place < 2 and number(5, *key, "mask") else None,
        predicted_iou=0.7 + number(250, *key, "iou") / 1000,
        clicks=((0.5, 0.5, 1),),
    )


def built(name: str, words: list[str]) -> dict[str, Any]:
    """Return what `build-shards` writes."""
    out = f"{MIRROR}/out/{name}"
    sources = ["--images", f"{MIRROR}/images", "--annotations", f"{MIRROR}/annotations", "--out", out]
    with contextlib.redirect_stdout(io.StringIO()):
        code = build_shards([*words, *sources, "--workers", "1", "--no-cache"])
    fs, path = fsspec.url_to_fs(out)
    info = json.loads(fs.cat_file(f"{path}/dataset.json"))
    del info["index"]  # the bytes of a Parquet file depend on the version of pyarrow
    hashes = {
        file[len(path) + 1 :]: hashlib.sha256(fs.cat_file(file)).hexdigest() for file in fs.glob(f"{path}/*/*.tar")
    }
    rows = {
        table: [
            json.dumps(row, ensure_ascii=False)
            for row in pq.read_table(io.BytesIO(fs.cat_file(f"{path}/{table}.parquet"))).to_pylist()
        ]
        for table in ("index", "accounts")
    }
    return {"exit code": code, "dataset.json": info, "sha256": hashes, **rows}


def write_dataset(name: str, count: int) -> Dataset:
    """Write a dataset of grey images, some of them with a car."""
    samples = [_sample(name, n) for n in range(count)]
    return support.write_dataset(f"memory://facts/{name}", {"train": samples}, per_shard=16)


def _sample(name: str, n: int) -> Sample:
    width, height = (48, 64) if number(3, name, n) == 0 else (64, 48)
    image = grey_jpeg(width, height, bytes(100 + number(2000, name, n, "bytes")))
    objects = support.sample(number(9, name, n, "car") // 8, width=width, height=height)
    return replace(objects, image_id=f"{name}{n:04d}", image=image)


def order_facts() -> dict[str, Any]:
    """Return the first 50 batches of training orders: of synthetic indexes of 160 MB, and of streams of datasets."""
    indexes = [
        support.make_index(
            [50_000 + number(100_000, name, n) for n in range(count)],
            per_shard=300,
            classes=[[1, 2] if number(12, name, n, "rare") == 0 else [1] for n in range(count)],
        )
        for count, name in ((1600, "a"), (400, "b"))
    ]
    facts: dict[str, Any] = {}
    for seed in (0, 7):
        for name, options in ORDERS.items():
            settings = OrderSettings(batch_size=4, seed=seed, **options)
            alone = Order(indexes[0], settings)
            facts[f"{name}, seed {seed}"] = _text(alone.rows(position) for position in range(50))
            if "group_by_aspect" not in options:  # not possible in a mix
                both = MixedOrder(indexes, (3, 1), settings)
                rows = ([f"{'ab'[part]}{row}" for part in (0, 1) for row in both.rows(p, part)] for p in range(50))
                facts[f"{name}, mix, seed {seed}"] = _text(rows)
        facts[f"stream of a mix, seed {seed}"] = _text(_stream(seed))
    return facts


def _text(batches: Any) -> list[str]:
    return [" ".join(map(str, batch)) for batch in batches]


def _stream(seed: int) -> list[list[str]]:
    datasets = [write_dataset(name, count) for name, count in (("a", 90), ("b", 40))]
    options: dict[str, Any] = {"batch_size": 4, "seed": seed, "lanes": 2, "repeat_threshold": 0.3}
    batches = iter(ShardStream(Mix(datasets, [2, 1]), "train", **options))
    return [[sample.image_id for sample in next(batches)] for _ in range(50)]


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


def facts(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "facts" / f"{name}.json").read_text())
    return found


def test_build_shards_writes_the_same_shards_indexes_and_accounts(tmp_path: Path) -> None:
    write_mirror(tmp_path)
    assert {name: built(name, words.split()) for name, words in COMMANDS.items()} == facts("builds")


def test_training_orders_are_the_same() -> None:
    assert order_facts() == facts("orders")


def test_a_checkpoint_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = facts("checkpoint")
    state, place = checkpoint["state.json"], tmp_path / "checkpoints" / "step-000003"
    place.mkdir(parents=True)
    for name, entry in checkpoint["tensors"].items():
        data = safetensors.torch.save(
            {key: tensor(key, text) for key, text in entry["shapes"].items()}, metadata=entry["metadata"]
        )
        (place / name).write_bytes(data)
        state["files"][name] = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (place / "state.json").write_text(json.dumps(state).replace("RUN", str(tmp_path)))
    dataset = write_dataset("t", 24).root.url
    settings = {"data__val_split": "", "train__steps_per_epoch": 4, "train__ema": 0.9, "model__backbone": "resnet18"}
    assert train(tiny.arguments(dataset, tmp_path, **settings)) == 0
    [row] = tiny.rows(tmp_path / "metrics.jsonl")
    assert (row["step"], row["position"]) == (4, 4)
    assert math.isfinite(row["loss"])
    assert "the checkpoint is of another release: from here on, other RoIs are drawn" in caplog.text


def tensor(name: str, text: str) -> torch.Tensor:
    """Return small values; ones for the variance of a norm and for numbers of steps."""
    dtype, _, shape = text.partition(" ")
    value = 1 if dtype == "I64" or name.endswith("running_var") else 0.02
    return torch.full(json.loads(shape), value, dtype=DTYPES[dtype])
