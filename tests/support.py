"""Small samples, indexes and datasets for tests."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from shards.format import rle
from shards.format.dataset import Category, Dataset, Shard, open_dataset
from shards.format.dataset_writer import finish_dataset
from shards.format.index import Index, IndexFile
from shards.format.index_schema import INDEX_SCHEMA, IndexRow
from shards.format.sample import Instance, MaskPrediction, Sample
from shards.format.shard_tar import pack_shard, shard_path
from shards.order.epoch_order import Order
from shards.storage.location import Location

if TYPE_CHECKING:
    from demo.s3proxy import S3Proxy

Proxied = Callable[..., "AbstractContextManager[S3Proxy]"]  # the fixture `proxied`
REPOSITORY = Path(__file__).parents[1]
CATEGORIES = (Category(1, "Person", "/m/01g317"), Category(2, "Car", "/m/0k4j"))


def forget_connections(patch: pytest.MonkeyPatch) -> None:
    """Let this process find addresses and credentials again, by the environment of now."""
    for name in ("location._instances", "object_store._settings", "object_store._stores"):
        patch.setattr(f"shards.storage.{name}", {})


def run_examples(guide: str, names: dict[str, Any]) -> int:
    """Run the Python examples of a page of docs/ in order, with these global names, and return their number."""
    text = (REPOSITORY / "docs" / guide).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    for block in blocks:
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # a failure has the line number of the guide
        exec(compile(lines_before + block[1], guide, "exec"), names)
    return len(blocks)


def jpeg(width: int, height: int, seed: int) -> bytes:
    """Return a smooth random picture as JPEG."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def sample(number: int, *, width: int = 48, height: int = 32, masks: bool = True) -> Sample:
    """Return a sample with a masked person and, for odd numbers, a car with a box and no mask."""
    mask = np.zeros((height, width), np.uint8)
    mask[4:20, 6:30] = 1
    encoded = rle.encode(mask) if masks else None
    person = Instance(1, (6.0, 4.0, 24.0, 16.0), encoded, "b0", "/m/01g317", predicted_iou=0.8)
    car = Instance(2, (10.0, 2.0, 20.0, 25.0), None, "", "/m/0k4j", is_occluded=True)
    return Sample(
        image_id=f"{number:016x}",
        image=jpeg(width, height, number),
        width=width,
        height=height,
        instances=(person, car) if number % 2 else (person,),
        verified_present=(1,),
        verified_absent=(2,) if number % 2 == 0 else (),
        license="https://creativecommons.org/licenses/by/2.0/",
        author="Zoë & <Søn>",
    )


def filled(number: int) -> Sample:
    """Return a `sample` whose car, of odd numbers, has a predicted mask: that of the person."""
    person, *cars = sample(number).instances
    like, prediction = replace(person, box_id="", predicted_iou=None), MaskPrediction(0.93, "seed-1")
    masked = [replace(like, category_id=car.category_id, label=car.label, prediction=prediction) for car in cars]
    return replace(sample(number), instances=(person, *masked))


def write_dataset(
    root: str | Path,
    splits: Mapping[str, Sequence[Sample]],
    *,
    per_shard: int = 8,
    categories: Sequence[Category] = CATEGORIES,
    plan: str = "test",
) -> Dataset:
    """Pack samples into a finished dataset at `root` and open it."""
    location = Location(str(root))
    rows: list[IndexRow] = []
    shards: list[Shard] = []
    for split, samples in splits.items():
        for number, first in enumerate(range(0, len(samples), per_shard)):
            packed = pack_shard(samples[first : first + per_shard], split=split, path=shard_path(split, number))
            (location / packed.shard.path).write(packed.data)
            rows.extend(packed.rows)
            shards.append(packed.shard)
    finish_dataset(location, rows, shards, categories, plan=plan)
    return open_dataset(location)


def write_spoilt(root: Path, edit: Callable[[dict[str, Any]], Any]) -> str:
    """Write a dataset of one sample with a changed JSON member and the right checksums; return the sample's key."""
    good = sample(1)
    members = good.to_members()
    value = json.loads(members["json"])
    edit(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    members["json"] = text.encode("utf-8", "surrogatepass")
    with patch.object(Sample, "to_members", lambda _: members):
        write_dataset(root, {"train": [good]})
    return good.image_id


def damage(root: Path, kinds: Mapping[int, str]) -> None:
    """Damage samples of the training split, by row: their "bytes", or with the right crc32 "image", "json" or "tar"."""
    index = open_dataset(str(root)).index("train")
    checksums = {}
    for row, kind in kinds.items():
        place, start = root / index.shard_paths[int(index.shard[row])], int(index.offset[row])
        data = bytearray(place.read_bytes())
        own = memoryview(data)[start : start + int(index.nbytes[row])]
        at = {"bytes": 512 + 9, "image": 512, "json": bytes(own).index(b'{"'), "tar": 0}[kind]
        own[at : at + 4] = b"spam"
        if kind != "bytes":
            checksums[index.image_id(row)] = zlib.crc32(own)
        own.release()
        place.write_bytes(data)

    def sign(rows: list[dict[str, Any]]) -> None:
        for entry in rows:
            entry["crc32"] = checksums.get(entry["image_id"], entry["crc32"])

    edit_index(root, sign)


def edit_info(root: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the value of a dataset's dataset.json."""
    info = json.loads((root / "dataset.json").read_text())
    edit(info)
    (root / "dataset.json").write_text(json.dumps(info))


def edit_index(root: Path, edit: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change rows of a dataset's index, or replace them by the table that `edit` returns, and the index's sha256."""
    rows = pq.read_table(root / "index.parquet").to_pylist()
    table = edit(rows)
    pq.write_table(
        table if isinstance(table, pa.Table) else pa.Table.from_pylist(rows, schema=INDEX_SCHEMA),
        root / "index.parquet",
    )
    sign_index(root)


def sign_index(root: Path) -> None:
    sha256 = hashlib.sha256((root / "index.parquet").read_bytes()).hexdigest()
    edit_info(root, lambda info: info["index"].update(sha256=sha256))


def make_index(nbytes: Sequence[int] | np.ndarray, per_shard: int = 5, classes: Sequence | None = None) -> Index:
    """Return an index of samples of the given lengths, with one annotation of each of their classes (default: class 1).

    Every third image is a portrait.
    """
    count = len(nbytes)
    shards = [f"train/{n // per_shard:06d}.tar" for n in range(count)]
    classes = [sorted(own) for own in classes] if classes is not None else [[1]] * count
    columns = {
        "image_id": [f"{n:016x}" for n in range(count)],
        "split": ["train"] * count,
        "shard": shards,
        "offset": np.cumsum(nbytes) - nbytes,
        "nbytes": nbytes,
        "crc32": np.arange(count),
        "width": np.full(count, 60),
        "height": np.where(np.arange(count) % 3 == 0, 80, 40),
        "classes": classes,
        **{name: [[1] * len(own) for own in classes] for name in ("instances", "masks", "groups")},
    }
    table = pa.table({name: pa.array(columns[name], INDEX_SCHEMA.field(name).type) for name in INDEX_SCHEMA.names})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return Index.read(IndexFile(buffer.getvalue()), tuple(dict.fromkeys(shards)))


def whole_epoch(order: Order, epoch: int) -> NDArray[np.int64]:
    """Return the rows of all batches of one epoch, int64 [batches_per_epoch, B]."""
    first = epoch * order.batches_per_epoch
    return np.stack([order.rows(first + number) for number in range(order.batches_per_epoch)])
