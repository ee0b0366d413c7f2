"""A shard dataset: `dataset.json`, `index.parquet` and the shards they describe.

`dataset.json` is written last: a root without it is an unfinished build. The index has one row per sample, in the order
(split, shard, offset), and is all that a reader needs to fetch any sample with one range request.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.common.argument_checks import flat, is_text
from shards.common.errors import DatasetError, StorageError
from shards.common.text import counted, one_line, shown
from shards.format.index import LARGEST_ID, Index, IndexFile
from shards.format.index_schema import index_error, size_fault
from shards.format.sample import Category as Category
from shards.format.selection import Selection, find_class, select_rows
from shards.storage.explain import storage_errors
from shards.storage.location import Location
from shards.storage.reads import Read, read_many

if TYPE_CHECKING:
    import pandas as pd

    from shards.export.torchvision import TorchvisionDataset, Transforms

FORMAT = "maskstream"
VERSION = 1
VERSIONS = (1, 2, 3)  # that this release reads; `Sample.version` says what needs the later ones
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.parquet"
ACCOUNTS_FILE = "accounts.parquet"
SPLITS = ("train", "val", "test")

# The columns are the fields of `shards.format.accounts.Account`.
_ACCOUNT_FIELDS = ("kind", "split", "image_id", "box_id", "source", "status", "detail")
ACCOUNTS_SCHEMA = pa.schema([(name, pa.string()) for name in _ACCOUNT_FIELDS])


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished tar: its path under the root, split, samples, length in bytes, sha256 (hex) and format version."""

    path: str
    split: str
    samples: int
    nbytes: int
    sha256: str
    version: int = VERSION  # the highest that one of its samples needs

    def to_json(self) -> dict[str, Any]:
        """Return its object in `dataset.json`, which states the version only where it is not the first."""
        return {name: value for name, value in asdict(self).items() if name != "version" or value != VERSION}


@dataclass(frozen=True)
class DatasetInfo:
    """The contents of `dataset.json`."""

    categories: tuple[Category, ...]  # the classes, ids ascending
    shards: tuple[Shard, ...]  # every shard, in the order (split, path)
    index_sha256: str  # hash of `index.parquet`
    plan: str = ""  # fingerprint of the builder's plan; "" without one
    source: dict[str, Any] = field(default_factory=dict)  # where the data came from

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of `dataset.json`."""
        splits = {}
        for split in self.splits:
            shards = self.shards_of(split)
            sizes = {"samples": self.samples(split), "nbytes": sum(shard.nbytes for shard in shards)}
            splits[split] = {"shards": len(shards), **sizes}
        return {
            "format": FORMAT,
            "version": self.version,
            "classes": [asdict(category) for category in self.categories],
            "splits": splits,
            "shards": [shard.to_json() for shard in self.shards],
            "index": {"path": INDEX_FILE, "sha256": self.index_sha256},
            "plan": self.plan,
            "source": self.source,
        }

    @property
    def version(self) -> int:
        """The version of the format: the highest that a shard needs."""
        return max((shard.version for shard in self.shards), default=VERSION)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a shard, in the order of `SPLITS`."""
        return tuple(split for split in SPLITS if self.shards_of(split))

    def shards_of(self, split: str) -> list[Shard]:
        """Return the shards of a split."""
        return [shard for shard in self.shards if shard.split == split]

    def samples(self, split: str) -> int:
        """Return the number of samples of a split."""
        return sum(shard.samples for shard in self.shards_of(split))

    @classmethod
    def from_json(cls, value: Any, where: str) -> DatasetInfo:
        """Parse and check the object of `dataset.json`; a DatasetError that names `where` if it is not right."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise DatasetError(f"{where}: not a {FORMAT} dataset (format is missing or another): build one first")
        version = value.get("version")
        if type(version) is not int or version not in VERSIONS:
            found, known = f"{where}: format version {shown(version)}", f"{VERSIONS[0]} to {VERSIONS[-1]}"
            raise DatasetError(f"{found}, this release reads versions {known}: upgrade maskstream")
        try:
            info = cls(
                categories=tuple(flat(Category, category) for category in value["classes"]),
                shards=tuple(flat(Shard, _versioned(shard)) for shard in value["shards"]),
                index_sha256=str(value["index"]["sha256"]),
                plan=value["plan"],
                source=dict(value["source"]),
            )
            _check_values(info)
            if info.version != version:
                raise ValueError(f"version is {version}, its shards have {info.version}")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise DatasetError(f"{where}: damaged ({reason}): build the dataset again") from error
        return info


def _versioned(shard: Any) -> Any:
    return {"version": VERSION, **shard} if isinstance(shard, dict) else shard


def _check_values(info: DatasetInfo) -> None:
    if not isinstance(info.plan, str) or not is_text(info.plan):
        raise ValueError(f"plan is {shown(info.plan)}, not a text")
    for category in info.categories:
        if not 1 <= category.id <= LARGEST_ID:
            raise ValueError(f"id of a category is {shown(category.id)}: ids are from 1 to {LARGEST_ID}")
    for shard in info.shards:
        parts = shard.path.split("/")
        if not all(part.strip(".") for part in parts) or not re.fullmatch(r"[\w./=@+~-]+", shard.path):
            raise ValueError(
                f"path of a shard is {shown(shard.path)}: it must be under the dataset, as train/000000.tar"
            )
        if shard.split not in SPLITS:
            raise ValueError(f"split of a shard is {shown(shard.split)}, not one of {', '.join(SPLITS)}")
        if min(shard.samples, shard.nbytes) < 0:
            raise ValueError(f"{shown(shard.path)} has {shard.samples} samples and {shard.nbytes} bytes")


@dataclass(frozen=True, repr=False)
class Dataset:
    """A finished dataset: its location, `dataset.json`, the index, and what `select` chose of it."""

    root: Location
    info: DatasetInfo
    columns: IndexFile
    selection: Selection = Selection()

    def __repr__(self) -> str:
        names = [category.name for category in self.categories]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        counts = {split: counted(self.info.samples(split), "sample") for split in self.splits}
        splits = ", ".join(f"{split}: {count}" for split, count in counts.items()) or "no samples"
        if self.selection != Selection():
            splits = f"before selection {splits}; selected: {self.selection}"
        return f"Dataset({str(self.root)!r}, classes: {', '.join(names[:5])}{more}; {splits})"

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes, ids ascending; after `select`, the chosen ones with unchanged ids."""
        chosen = self.selection.classes
        return tuple(c for c in self.info.categories if chosen is None or c.id in chosen)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a shard, in the order of `SPLITS`."""
        return self.info.splits

    @cached_property
    def table(self) -> pa.Table:
        """All rows and columns of the index (see `IndexFile.table`), selected or not; a DatasetError if damaged."""
        return self.columns.table()

    def index(self, split: str) -> Index:
        """Return the selected rows of one split; a DatasetError if there are none, or the index is damaged."""
        if split not in self.splits:
            raise DatasetError(f"{self.root}: there is no split {split!r}: it has {', '.join(self.splits) or 'none'}")
        paths = list(dict.fromkeys(shard.path for shard in self.info.shards_of(split)))
        return select_rows(Index.read(self.columns, paths), self.selection, f"{self.root}: split {split!r}")

    def to_pandas(self, split: str) -> pd.DataFrame:
        """Return the selected rows of a split as a DataFrame, one row per sample, in the order of the shards.

        Columns: `image_id`, `shard`, `offset`, `nbytes`, `crc32`, `width`, `height`, then for each class, under its
        name, the number of its objects. A name that is taken is followed by the class's id, as in `width (7)`. Errors
        are those of `index`.
        """
        import pandas as pd

        index = self.index(split)
        assert index.labels is not None
        shards = pd.Categorical.from_codes(index.shard, categories=list(index.shard_paths))
        arrays = {name: getattr(index, name) for name in ("offset", "nbytes", "crc32", "width", "height")}
        columns = {"image_id": index.image_ids.to_pylist(), "shard": shards, **arrays}
        classes, samples, objects = index.labels.classes, index.labels.samples, index.labels.flat("instances")
        for category in self.categories:
            name = f"{category.name} ({category.id})" if category.name in columns else category.name
            own = classes == category.id
            columns[name] = np.zeros(len(index), np.int64)
            columns[name][samples[own]] = objects[own]
        return pd.DataFrame(columns)

    def to_torchvision(
        self,
        split: str,
        transforms: Transforms | None = None,
        *,
        keep_unmasked: bool = False,
        keep_groups: bool = False,
    ) -> TorchvisionDataset:
        """Return the selected samples of a split as a map-style torch dataset, for torchvision's detection scripts.

        An item is a PIL image and a target: `boxes` (tv_tensors.BoundingBoxes XYXY, float32 [N, 4]), `labels` (the
        classes' ids, int64 [N]), `masks` (tv_tensors.Mask, uint8 [N, H, W]), `image_id` (the id that `maskstream
        export --to coco` gives the image), `area` (float32 [N]) and `iscrowd` (int64 [N]). Each item is one range
        request, so that it can be read in any order, by loader processes of any start method.

        Args:
            split: "train", "val" or "test".
            transforms: a function of image and target that returns both, such as one of torchvision.transforms.v2.
            keep_unmasked: keep objects without a mask, with an empty one, which Mask R-CNN would learn as such.
            keep_groups: keep group-of regions, as objects with `iscrowd` 1, for an evaluation that ignores them.

        Errors are those of `index`, and a SampleError for a sample that cannot be read.
        """
        try:
            from shards.export.torchvision import TorchvisionDataset
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"to_torchvision needs {error.name}: pip install '.[train]'", name=error.name
            ) from error
        return TorchvisionDataset(self, split, transforms, keep_unmasked, keep_groups)

    def accounts(self) -> pd.DataFrame:
        """Return `accounts.parquet` as a DataFrame: what became of every image and mask that was requested.

        The columns are the fields of `shards.format.accounts.Account`. A DatasetError is raised if the file is missing
        or damaged, a StorageError if it cannot be read.
        """
        location = self.root / ACCOUNTS_FILE
        try:
            return accounts_table(location.read(), str(location)).to_pandas()
        except StorageError as error:
            if not error.missing:
                raise
            raise DatasetError(f"{self.root}: there is no {ACCOUNTS_FILE}: build the dataset again") from error

    def select(self, *, classes: Sequence[str | int] | None = None, fraction: float = 1.0, seed: int = 0) -> Dataset:
        """Return this dataset with a part of its samples; the others are never fetched. Only the index is read.

        A subset of classes is what `build-shards` would have built for these classes: the samples that have one of
        them, without annotations of the other classes, whose objects become background. Ids do not change. A selection
        can be narrowed further, in any order; arguments that are left out keep their values.

        Args:
            classes: names, MIDs or ids; None for all samples with all annotations.
            fraction: above 0 to 1: about this share of the (remaining) samples, chosen by a hash of seed and ImageID,
                so that a larger fraction contains a smaller one, in every split and every build. Only once below 1.
            seed: seed of the hash; not negative.

        Raises:
            DatasetError: an unknown class or none at all, a number out of range, or a fraction of a fraction.
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
    """Open a finished dataset at a local path or any fsspec URL: `dataset.json` and `index.parquet` are read.

    Raises:
        DatasetError: unfinished, of another format or version, or an index that does not belong to it.
        StorageError: the root cannot be reached.
    """
    location = root_location(root)
    answers = read_many([Read(location / DATASET_FILE), Read(location / INDEX_FILE)], before_fork=True)
    info = DatasetInfo.from_json(_value_of(location, answers[0]), str(location / DATASET_FILE))
    try:
        data = _read(location / INDEX_FILE, answers[1])
    except StorageError as error:
        raise DatasetError(f"{location}: {INDEX_FILE} cannot be read: build the dataset again ({error})") from error
    found = hashlib.sha256(data).hexdigest()
    if found != info.index_sha256:
        raise DatasetError(
            f"{location / INDEX_FILE}: sha256 is {found}, {DATASET_FILE} says {shown(info.index_sha256)}: "
            "the two files are not of one build; build the dataset again"
        )
    where, samples = str(location / INDEX_FILE), sum(shard.samples for shard in info.shards)
    if fault := size_fault(data, samples, len(info.categories), where):
        raise index_error(where, fault)
    return Dataset(location, info, IndexFile(data, where))


def root_location(root: str | os.PathLike[str] | Location) -> Location:
    """Return the location of a dataset's root; a DatasetError if `root` is not a path or URL."""
    if isinstance(root, Location):
        return root
    if not isinstance(root, str | os.PathLike):
        given = shown(root)
        raise DatasetError(f"the root of a dataset is {given}: give a local path or a URL such as s3://bucket/prefix")
    return Location(str(os.fspath(root)))


def read_value(root: Location) -> Any:
    """Return the JSON of `dataset.json`, for `DatasetInfo.from_json`; a DatasetError if it is missing or not JSON."""
    [answer] = read_many([Read(root / DATASET_FILE)], before_fork=True)
    return _value_of(root, answer)


def _value_of(root: Location, answer: bytes | Exception) -> Any:
    try:
        data = _read(root / DATASET_FILE, answer)
    except StorageError as error:
        if not error.missing:
            raise
        raise DatasetError(
            f"{root}: there is no {DATASET_FILE}: not a shard dataset, or a build or fill that has not finished "
            "(run the same command again to finish it)"
        ) from error
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{root / DATASET_FILE}: not JSON ({error}): build the dataset again") from error


def _read(location: Location, answer: bytes | Exception) -> bytes:
    if isinstance(answer, bytes):
        return answer
    with storage_errors(location.url):
        raise answer


def accounts_table(data: bytes, where: str) -> pa.Table:
    """Parse the bytes of `accounts.parquet`; a DatasetError that names `where` if they are not such a table."""
    try:
        return pq.read_table(pa.BufferReader(data), schema=ACCOUNTS_SCHEMA)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{where}: damaged ({one_line(error)[:200]}): build the dataset again") from error
