"""A shard dataset: `dataset.json`, `index.parquet` and the shards they describe.

`dataset.json` is written last: a root without it is an unfinished build. The index has one row a sample, in the order
(split, shard, offset), and is all that a reader needs to fetch any sample with one range request.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.common.errors import DatasetError, StorageError
from shards.common.json_fields import flat, is_text
from shards.common.text import counted, shown
from shards.format.index import LARGEST_ID, Index, IndexFile
from shards.format.index_schema import INDEX_SCHEMA, IndexRow, one_line
from shards.format.sample import canonical_json
from shards.format.selection import Selection, find_class, select_rows
from shards.storage.explain import storage_errors
from shards.storage.location import Location
from shards.storage.ranges import Read, read_many

FORMAT = "maskstream"
VERSION = 1
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.parquet"
ACCOUNTS_FILE = "accounts.parquet"
SPLITS = ("train", "val", "test")

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
            DatasetError: another format, a newer version, missing keys, or values that cannot be.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise DatasetError(f"{where}: not a {FORMAT} dataset (format is missing or another): build one first")
        version = value.get("version")
        if version != VERSION:
            raise DatasetError(
                f"{where}: format version {version!r}, this release reads version {VERSION}: upgrade maskstream"
            )
        try:
            info = cls(
                categories=tuple(flat(Category, category) for category in value["classes"]),
                shards=tuple(flat(Shard, shard) for shard in value["shards"]),
                index_sha256=str(value["index"]["sha256"]),
                plan=value["plan"],
                source=dict(value["source"]),
            )
            _check_values(info)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise DatasetError(f"{where}: damaged ({reason}): build the dataset again") from error
        return info


def _check_values(info: DatasetInfo) -> None:
    """ValueError for a value that no dataset has."""
    if not isinstance(info.plan, str) or not is_text(info.plan):
        raise ValueError(f"plan is {shown(info.plan)}, not a text")
    for category in info.categories:
        if not 1 <= category.id <= LARGEST_ID:
            raise ValueError(f"id of a category is {shown(category.id)}: ids are from 1 to {LARGEST_ID}")
    for shard in info.shards:
        if shard.split not in SPLITS:
            raise ValueError(f"split of a shard is {shown(shard.split)}, not one of {', '.join(SPLITS)}")
        if min(shard.samples, shard.nbytes) < 0:
            raise ValueError(f"{shown(shard.path)} has {shard.samples} samples and {shard.nbytes} bytes")


@dataclass(frozen=True)
class Dataset:
    """A finished dataset: where it is, what `dataset.json` says, and its index.

    Attributes:
        root: where it lies.
        info: what `dataset.json` holds.
        columns: the index, of which a column is decoded when it is asked for.
        selection: which samples, with which of their annotations; everything unless `select` was called.
    """

    root: Location
    info: DatasetInfo
    columns: IndexFile
    selection: Selection = Selection()

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes, ids ascending; with `select`, the chosen ones, under the ids that they always had."""
        chosen = self.selection.classes
        return tuple(c for c in self.info.categories if chosen is None or c.id in chosen)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a shard, in the order of `SPLITS`."""
        return tuple(split for split in SPLITS if any(shard.split == split for shard in self.info.shards))

    @cached_property
    def table(self) -> pa.Table:
        """All rows and columns of the index, schema `INDEX_SCHEMA`, whatever was selected.

        Raises:
            DatasetError: it holds what no index holds.
        """
        return self.columns.table()

    def index(self, split: str) -> Index:
        """The selected rows of one split.

        Raises:
            DatasetError: the dataset has no such split, the selection leaves nothing of it, or the index is damaged.
        """
        if split not in self.splits:
            raise DatasetError(f"{self.root}: there is no split {split!r}: it has {', '.join(self.splits) or 'none'}")
        paths = [shard.path for shard in self.info.shards if shard.split == split]
        index = Index.read(self.columns, paths, str(self.root / INDEX_FILE))
        return select_rows(index, self.selection, f"{self.root}: split {split!r}")

    def select(self, *, classes: Sequence[str | int] | None = None, fraction: float = 1.0, seed: int = 0) -> Dataset:
        """This dataset with a part of its samples; the others are never fetched. The index alone decides.

        A subset of classes is what `build-shards` would have made of these classes: the samples that have one of them,
        without annotations of the other classes, whose objects are background like everything else that has no label.
        Ids stay as they are.

        Of a selection this is a part: classes are chosen among those that it has, and what is not chosen anew stays as
        it was. Which came first makes no difference.

        Args:
            classes: names, MIDs or ids; None for all samples with all annotations.
            fraction: above 0 to 1: about this share of the (remaining) samples, chosen by a hash of seed and ImageID,
                so that a larger fraction holds all of a smaller one, in every split and every build. Only once below 1.
            seed: of the hash; not negative.

        Raises:
            DatasetError: an unknown class (the nearest names are told) or none at all, a fraction or seed out of its
                range, or a fraction of a fraction.
        """
        where, before = str(self.root), self.selection
        if classes is None:
            ids = before.classes
        elif isinstance(classes, str) or not isinstance(classes, Iterable):
            raise DatasetError(f"{where}: classes is {classes!r}: give a list, classes=[{classes!r}]")
        elif not len(classes):
            raise DatasetError(f"{where}: classes is empty: name at least one, or give classes=None for all")
        else:
            ids = tuple(sorted({find_class(self.categories, c, where).id for c in classes}))
        return replace(self, selection=before.narrowed(ids, fraction, seed, where))


def open_dataset(root: str | os.PathLike[str] | Location) -> Dataset:
    """Open a finished dataset with two reads at a time: `dataset.json` and `index.parquet`.

    Raises:
        DatasetError: unfinished, of another format or version, or an index that does not belong to it.
        StorageError: the place cannot be reached.
    """
    if not isinstance(root, str | os.PathLike | Location):
        raise DatasetError(
            f"the root of a dataset is {shown(root)}: give a local path or a URL such as s3://bucket/prefix"
        )
    location = root if isinstance(root, Location) else Location(str(os.fspath(root)))
    answers = read_many([Read(location / DATASET_FILE), Read(location / INDEX_FILE)])
    info = _info_of(location, answers[0])
    try:
        data = _read(location / INDEX_FILE, answers[1])
    except StorageError as error:
        raise DatasetError(f"{location}: {INDEX_FILE} cannot be read: build the dataset again ({error})") from error
    found = hashlib.sha256(data).hexdigest()
    if found != info.index_sha256:
        raise DatasetError(
            f"{location / INDEX_FILE}: sha256 is {found}, {DATASET_FILE} says {info.index_sha256}: "
            "the two files are not of one build; build the dataset again"
        )
    return Dataset(location, info, IndexFile(data, str(location / INDEX_FILE)))


def read_value(root: Location) -> Any:
    """Read `dataset.json` alone, as it is: `DatasetInfo.from_json` makes something of it.

    Raises:
        DatasetError: there is none, or it is no JSON.
        StorageError: the place cannot be reached.
    """
    [answer] = read_many([Read(root / DATASET_FILE)])
    return _value_of(root, answer)


def _info_of(root: Location, answer: bytes | Exception) -> DatasetInfo:
    return DatasetInfo.from_json(_value_of(root, answer), str(root / DATASET_FILE))


def _value_of(root: Location, answer: bytes | Exception) -> Any:
    try:
        data = _read(root / DATASET_FILE, answer)
    except StorageError as error:
        if not error.missing:
            raise
        raise DatasetError(
            f"{root}: there is no {DATASET_FILE}: not a shard dataset, or a build that has not finished "
            "(run the same build-shards command again to finish it)"
        ) from error
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{root / DATASET_FILE}: not JSON ({error}): build the dataset again") from error


def _read(location: Location, answer: bytes | Exception) -> bytes:
    """What was read.

    Raises:
        StorageError: for what went wrong.
    """
    if isinstance(answer, bytes):
        return answer
    with storage_errors(location.url):
        raise answer


def accounts_table(data: bytes, where: str) -> pa.Table:
    """Parse the bytes of `accounts.parquet`; `where` is named in errors.

    Raises:
        DatasetError: the data is not such a table.
    """
    try:
        return pq.read_table(pa.BufferReader(data), schema=ACCOUNTS_SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{where}: damaged ({one_line(error)}): build the dataset again") from error


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
            raise DatasetError(f"{shard.path} holds {counted(shard.samples, 'sample')}, the index {counts[shard.path]}")
