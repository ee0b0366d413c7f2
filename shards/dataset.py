"""A shard dataset: `dataset.json`, `index.parquet` and the shards they describe.

`dataset.json` is written last: a root without it is an unfinished build. The index has one row a sample, in the order
(split, shard, offset), and is all that a reader needs to fetch any sample with one range request.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.errors import DatasetError, StorageError
from shards.sample import canonical_json
from shards.storage import Location

FORMAT = "maskstream"
VERSION = 1
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.parquet"
ACCOUNTS_FILE = "accounts.parquet"
SPLITS = ("train", "val", "test")

INDEX_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),  # the shard's path below the root, such as train/000000.tar
        ("offset", pa.int64()),  # of the sample's first tar header in the shard, in bytes
        ("nbytes", pa.int64()),  # of both members with headers and padding; offset + nbytes is the next sample
        ("crc32", pa.uint32()),  # of those bytes
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("classes", pa.list_(pa.int32())),  # ids of the classes that have an instance, ascending
        ("instances", pa.list_(pa.int32())),  # one count a class of `classes`: boxes, with masks or without
        ("masks", pa.list_(pa.int32())),  # likewise: instances with a mask
        ("groups", pa.list_(pa.int32())),  # likewise: instances that are group-of regions
    ]
)

ACCOUNTS_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # "image" or "mask"
        ("split", pa.string()),
        ("image_id", pa.string()),
        ("box_id", pa.string()),  # "" for an image
        ("source", pa.string()),  # the file's name at the source: <ImageID>.jpg or the MaskPath
        ("status", pa.string()),  # "packed", or the reason why not
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Category:
    """A class of the dataset: an id from 1, its name, and its MID at the source."""

    id: int
    name: str
    mid: str


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished tar: its path below the root, its split, samples, length in bytes and sha256 (hex)."""

    path: str
    split: str
    samples: int
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One row of the index; the columns of `INDEX_SCHEMA`."""

    image_id: str
    split: str
    shard: str
    offset: int
    nbytes: int
    crc32: int
    width: int
    height: int
    classes: tuple[int, ...]
    instances: tuple[int, ...]
    masks: tuple[int, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` holds.

    Attributes:
        categories: the classes, ids ascending.
        shards: every shard, in the order (split, path).
        index_sha256: of `index.parquet`, which ties the two files together.
        plan: the fingerprint of the plan that the builder carried out.
        source: where the data came from, as the builder tells it.
    """

    categories: tuple[Category, ...]
    shards: tuple[Shard, ...]
    index_sha256: str
    plan: str = ""
    source: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `dataset.json`."""
        splits = {
            split: {
                "shards": len(shards),
                "samples": sum(shard.samples for shard in shards),
                "nbytes": sum(shard.nbytes for shard in shards),
            }
            for split in SPLITS
            if (shards := [shard for shard in self.shards if shard.split == split])
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "classes": [asdict(category) for category in self.categories],
            "splits": splits,
            "shards": [asdict(shard) for shard in self.shards],
            "index": {"path": INDEX_FILE, "sha256": self.index_sha256},
            "plan": self.plan,
            "source": self.source,
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> DatasetInfo:
        """Read and check `dataset.json`'s object; `where` is named in errors.

        Raises:
            DatasetError: another format, a newer version, or missing keys.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise DatasetError(f"{where}: not a {FORMAT} dataset (format is missing or another): build one first")
        version = value.get("version")
        if version != VERSION:
            raise DatasetError(
                f"{where}: format version {version!r}, this release reads version {VERSION}: upgrade maskstream"
            )
        try:
            return cls(
                categories=tuple(Category(**category) for category in value["classes"]),
                shards=tuple(Shard(**shard) for shard in value["shards"]),
                index_sha256=str(value["index"]["sha256"]),
                plan=str(value["plan"]),
                source=dict(value["source"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{where}: damaged ({error!r}): build the dataset again") from error


@dataclass(frozen=True)
class Index:
    """The rows of one split as arrays, in the order in which the samples lie in the shards.

    Attributes:
        table: the rows, schema `INDEX_SCHEMA`.
        shard_paths: the distinct shards, in order.
    """

    table: pa.Table
    shard_paths: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def shard(self) -> NDArray[np.int32]:
        """(N,) position of each sample's shard in `shard_paths`."""
        codes = pc.index_in(self.table["shard"], value_set=pa.array(self.shard_paths, pa.string()))
        return np.asarray(codes.to_numpy(), dtype=np.int32)

    @cached_property
    def offset(self) -> NDArray[np.int64]:
        """(N,) bytes into the shard."""
        return self._column("offset", np.int64)

    @cached_property
    def nbytes(self) -> NDArray[np.int64]:
        """(N,) length of each sample in its shard."""
        return self._column("nbytes", np.int64)

    @cached_property
    def crc32(self) -> NDArray[np.uint32]:
        """(N,) of each sample's bytes."""
        return self._column("crc32", np.uint32)

    @cached_property
    def width(self) -> NDArray[np.int32]:
        """(N,) pixels."""
        return self._column("width", np.int32)

    @cached_property
    def height(self) -> NDArray[np.int32]:
        """(N,) pixels."""
        return self._column("height", np.int32)

    def image_id(self, row: int) -> str:
        """The key of one row."""
        return str(self.table["image_id"][row].as_py())

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any sample, place or length: the identity of the order over this index."""
        digest = hashlib.sha256()
        for part in (self.shard, self.offset, self.nbytes, self.crc32):
            digest.update(np.ascontiguousarray(part).tobytes())
        digest.update("\0".join(self.shard_paths).encode())
        return digest.hexdigest()[:16]

    def counts(self, column: str, categories: Sequence[Category]) -> dict[int, int]:
        """Totals a category id of `instances`, `masks` or `groups`; `images`: the samples that have the class."""
        ids = pc.list_flatten(self.table["classes"]).to_numpy()
        if column == "images":
            weights = np.ones(len(ids), dtype=np.int64)
        else:
            weights = pc.list_flatten(self.table[column]).to_numpy().astype(np.int64)
        totals = np.bincount(ids, weights=weights, minlength=max((c.id for c in categories), default=0) + 1)
        return {category.id: int(totals[category.id]) for category in categories}

    def _column(self, name: str, dtype: Any) -> NDArray[Any]:
        return np.asarray(self.table[name].to_numpy(), dtype=dtype)


@dataclass(frozen=True)
class Dataset:
    """A finished dataset: where it is, what `dataset.json` says, and its index."""

    root: Location
    info: DatasetInfo
    table: pa.Table

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes, ids ascending."""
        return self.info.categories

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a shard, in the order of `SPLITS`."""
        return tuple(split for split in SPLITS if any(shard.split == split for shard in self.info.shards))

    def index(self, split: str) -> Index:
        """The rows of one split.

        Raises:
            DatasetError: the dataset has no such split.
        """
        if split not in self.splits:
            raise DatasetError(f"{self.root}: there is no split {split!r}: it has {', '.join(self.splits) or 'none'}")
        rows = self.table.filter(pc.field("split") == split)
        return Index(rows, tuple(shard.path for shard in self.info.shards if shard.split == split))


def open_dataset(root: str | Location) -> Dataset:
    """Open a finished dataset with two reads: `dataset.json` and `index.parquet`.

    Raises:
        DatasetError: unfinished, of another format or version, or an index that does not belong to it.
        StorageError: the place cannot be reached.
    """
    location = Location(root) if isinstance(root, str) else root
    try:
        value = json.loads((location / DATASET_FILE).read())
    except StorageError as error:
        if not error.missing:
            raise
        raise DatasetError(
            f"{location}: there is no {DATASET_FILE}: not a shard dataset, or a build that has not finished "
            "(run the same build-shards command again to finish it)"
        ) from error
    except ValueError as error:
        raise DatasetError(f"{location / DATASET_FILE}: not JSON ({error}): build the dataset again") from error
    info = DatasetInfo.from_json(value, str(location / DATASET_FILE))
    try:
        data = (location / INDEX_FILE).read()
    except StorageError as error:
        raise DatasetError(f"{location}: {INDEX_FILE} cannot be read: build the dataset again ({error})") from error
    found = hashlib.sha256(data).hexdigest()
    if found != info.index_sha256:
        raise DatasetError(
            f"{location / INDEX_FILE}: sha256 is {found}, {DATASET_FILE} says {info.index_sha256}: "
            "the two files are not of one build; build the dataset again"
        )
    return Dataset(location, info, pq.read_table(io.BytesIO(data), schema=INDEX_SCHEMA))


def finish_dataset(
    root: Location,
    rows: Iterable[IndexRow],
    shards: Sequence[Shard],
    categories: Sequence[Category],
    *,
    plan: str = "",
    source: dict[str, Any] | None = None,
) -> DatasetInfo:
    """Write `index.parquet`, then `dataset.json`: the build is finished when this returns.

    Args:
        root: where the shards already lie.
        rows: every sample of every shard, in any order.
        shards: every shard, in any order.
        categories: the classes.
        plan: the plan's fingerprint.
        source: where the data came from; JSON values only.

    Raises:
        DatasetError: rows and shards contradict each other.
        StorageError: a file could not be written.
    """
    shards = sorted(shards, key=lambda shard: (SPLITS.index(shard.split), shard.path))
    position = {shard.path: number for number, shard in enumerate(shards)}
    ordered = sorted(rows, key=lambda row: (position.get(row.shard, -1), row.offset))
    _check_rows(ordered, shards)
    buffer = io.BytesIO()
    columns = {name: [getattr(row, name) for row in ordered] for name in INDEX_SCHEMA.names}
    pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), buffer, compression="zstd")
    info = DatasetInfo(
        categories=tuple(sorted(categories, key=lambda category: category.id)),
        shards=tuple(shards),
        index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        plan=plan,
        source=source or {},
    )
    (root / INDEX_FILE).write(buffer.getvalue())
    (root / DATASET_FILE).write(canonical_json(info.to_json()))
    return info


def _check_rows(rows: Sequence[IndexRow], shards: Sequence[Shard]) -> None:
    counts: dict[str, int] = {shard.path: 0 for shard in shards}
    seen: set[str] = set()
    for row in rows:
        if row.shard not in counts:
            raise DatasetError(f"sample {row.image_id} lies in {row.shard}, which is not a shard of this dataset")
        if row.image_id in seen:
            raise DatasetError(f"sample {row.image_id} occurs twice: an ImageID keys one sample of a dataset")
        counts[row.shard] += 1
        seen.add(row.image_id)
    for shard in shards:
        if counts[shard.path] != shard.samples:
            raise DatasetError(f"{shard.path} holds {shard.samples} samples, the index {counts[shard.path]}")
