"""The index of one split as arrays: all that reading and ordering its samples needs.

A column of `index.parquet` is decoded when it is first used: a dataset of a million samples opens in a fraction of a
second. Forked loader processes share the arrays, which nothing writes to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.common.errors import DatasetError
from shards.common.shared_arrays import SharedArrays, can_share
from shards.common.text import counted, one_line
from shards.format.index_schema import PREDICTED_COLUMN, check_column, check_schema, index_error, schema_of

LARGEST_ID = 1_000_000  # of a class: counts per class are arrays of up to this length
_ARRAYS = ("shard", "offset", "nbytes", "crc32", "width", "height")


@dataclass(frozen=True)
class IndexFile:
    """The bytes of `index.parquet`, of which a column is decoded when it is used; `where` is named in DatasetErrors."""

    data: bytes = field(repr=False)
    where: str = "index"

    def __post_init__(self) -> None:
        with self._damaged():
            check_schema(self.schema, self.where)

    @cached_property
    def schema(self) -> pa.Schema:
        """The schema of the file, which may have further columns."""
        with self._damaged():
            return pq.read_schema(pa.BufferReader(self.data))

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        with self._damaged():
            # `pq.read_table` would import pandas: see `_to_numpy`.
            file = pq.ParquetFile(pa.BufferReader(self.data), read_dictionary=["shard", "split"])
            column = file.read([name])[name]
            check_column(name, column, self.where)
        return column

    def table(self) -> pa.Table:
        """Return all columns of the format: `INDEX_SCHEMA`, and `predicted` if the dataset has predicted masks."""
        with self._damaged():
            schema = schema_of(self.schema)
            table = pq.read_table(pa.BufferReader(self.data), schema=schema)
            for name in schema.names:
                check_column(name, table[name], self.where)
        return table

    @contextmanager
    def _damaged(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            raise index_error(self.where, f"is not an index in Parquet ({one_line(error)[:200]})") from error


@dataclass(frozen=True)
class Labels:
    """The number of annotations of each class in each of N samples, from list columns with one list per sample."""

    columns: IndexFile = field(repr=False)  # the source of `classes`, `instances`, `masks`, `groups`, `predicted`
    rows: NDArray[np.int64] = field(repr=False)  # [N] the rows of `columns` that belong to the samples, ascending

    @property
    def classes(self) -> NDArray[np.int32]:
        """[P] the classes of sample 0, then those of sample 1, ...: one entry per pair of a sample and a class."""
        return self._classes[0]

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """[P] the sample of each entry of `classes`, from 0 to N - 1, ascending."""
        return np.repeat(np.arange(len(self.rows), dtype=np.int64), self._classes[1])

    def flat(self, column: str) -> NDArray[np.int32]:
        """Return [P] the entries of a column, parallel to `classes`; zeros for `predicted` of an index without it."""
        if column == PREDICTED_COLUMN.name and column not in self.columns.schema.names:
            return np.zeros_like(self.classes)
        values, lengths = self._flat(column)
        if not np.array_equal(lengths, self._classes[1]):
            raise index_error(self.columns.where, f"a row has another number of {column} than of classes")
        return values

    def take(self, rows: NDArray[np.int64]) -> Labels:
        """Return the labels of some samples, [n] rows ascending."""
        return Labels(self.columns, self.rows[rows])

    @cached_property
    def _classes(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """`classes`, and [N] the number of classes of each sample."""
        values, lengths = self._flat("classes")
        if len(values) and not 1 <= values.min() <= values.max() <= LARGEST_ID:
            raise index_error(self.columns.where, f"column classes has ids from {values.min()} to {values.max()}")
        return values, lengths

    def _flat(self, column: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        lists = self.columns[column]
        if len(self.rows) != len(lists):
            lists = lists.combine_chunks().take(pa.array(self.rows))
        values = np.asarray(pc.list_flatten(lists).to_numpy(), dtype=np.int32)
        return values, pc.list_value_length(lists).to_numpy()


@dataclass(frozen=True, repr=False)
class Index:
    """The N samples of one split, in the order of the shards."""

    shard_paths: tuple[str, ...]  # the split's shards, in order
    shard: NDArray[np.int32]  # [N] position of each sample's shard in `shard_paths`
    offset: NDArray[np.int64]  # [N] start of each sample in its shard, in bytes
    nbytes: NDArray[np.int64]  # [N] length of each sample in its shard, in bytes
    crc32: NDArray[np.uint32]  # [N] checksum of each sample's bytes
    width: NDArray[np.int32]  # [N] pixels
    height: NDArray[np.int32]  # [N] pixels
    image_ids: Any  # [N] the keys, Arrow strings
    labels: Labels | None = None  # the classes of each sample; None in loader processes, which do not need them
    # Maps category ids of the shards to those of the samples that are returned; annotations of other categories are
    # dropped. None: all, unchanged.
    category_ids: Mapping[int, int] | None = None

    def __len__(self) -> int:
        return len(self.shard)

    def __repr__(self) -> str:
        return f"Index({counted(len(self), 'sample')} in {counted(len(self.shard_paths), 'shard')})"

    @classmethod
    def read(cls, columns: IndexFile, shard_paths: Sequence[str]) -> Index:
        """Read the rows of one split's shards; a DatasetError if they are not in order, or have invalid values."""
        codes = _shard_codes(columns["shard"], shard_paths)
        rows = np.flatnonzero(codes >= 0)
        shard = codes[rows]
        if len(rows) and (rows[-1] - rows[0] >= len(rows) or np.any(np.diff(shard) < 0)):
            raise index_error(columns.where, "its rows are not in the order of the shards")
        start, end = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)

        def column(name: str, dtype: Any, least: int = 1) -> NDArray[Any]:
            values = np.ascontiguousarray(_to_numpy(columns[name].slice(start, end - start)), dtype=dtype)
            if len(values) and values.min() < least:
                raise index_error(columns.where, f"column {name} has {values.min()}")
            return values

        return cls(
            shard_paths=tuple(shard_paths),
            shard=shard,
            offset=column("offset", np.int64, 0),
            nbytes=column("nbytes", np.int64),
            crc32=column("crc32", np.uint32, 0),
            width=column("width", np.int32),
            height=column("height", np.int32),
            image_ids=_keys(columns["image_id"].slice(start, end - start), columns.where),
            labels=Labels(columns, rows),
        )

    def image_id(self, row: int) -> str:
        """Return the key of one row."""
        return str(self.image_ids[int(row)].as_py())

    def take(self, rows: NDArray[np.int64]) -> Index:
        """Return the index of some of the samples, [n] rows ascending."""
        arrays = {name: getattr(self, name)[rows] for name in _ARRAYS}
        labels = None if self.labels is None else self.labels.take(rows)
        return replace(self, **arrays, image_ids=self.image_ids.take(pa.array(rows)), labels=labels)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "shared"}
        if not can_share():
            return state
        # For a loader process that is being started: the arrays are shared, not sent.
        for name in (*_ARRAYS, "image_ids"):
            del state[name]
        return {**state, "shared": self.shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "shared" in state:
            *arrays, ends, characters = state.pop("shared")
            ids = pa.StringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(characters))
            state |= {**dict(zip(_ARRAYS, arrays)), "image_ids": ids}
        self.__dict__.update(state)

    @cached_property
    def shared(self) -> SharedArrays:
        """A copy of the arrays in shared memory."""
        _, ends, characters = _contiguous(self.image_ids).buffers()
        ids = (np.frombuffer(ends, np.int32, len(self) + 1), np.frombuffer(characters, np.uint8))
        return SharedArrays([*(getattr(self, name) for name in _ARRAYS), *ids])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any sample, its offset or length, and with the selection."""
        digest = hashlib.sha256()
        for part in (self.shard, self.offset, self.nbytes, self.crc32):
            digest.update(np.ascontiguousarray(part).tobytes())
        digest.update("\0".join(self.shard_paths).encode())
        if self.category_ids is not None:
            digest.update(repr(sorted(self.category_ids.items())).encode())
        return digest.hexdigest()[:16]

    def counts(self, column: str, categories: Sequence[Any]) -> dict[int, int]:
        """Return for each category id the total of `instances`, `masks`, `groups` or `predicted`, or its `images`."""
        assert self.labels is not None, "an index without labels counts nothing"
        weights = None if column == "images" else self.labels.flat(column).astype(np.int64)
        least = max((category.id for category in categories), default=0) + 1
        totals = np.bincount(self.labels.classes, weights=weights, minlength=least)
        return {category.id: int(totals[category.id]) for category in categories}


def row_numbers(rows: Any, samples: int) -> NDArray[np.int64]:
    """Return row numbers as int64 [n]; a DatasetError if they are no integers, out of range, or not in order."""
    found = np.asarray(rows)
    if found.ndim != 1 or not (len(found) == 0 or np.issubdtype(found.dtype, np.integer)):
        given = f"rows is an array of {found.dtype} of shape {found.shape}"
        raise DatasetError(f"{given}: give row numbers, one-dimensional (for a mask: np.flatnonzero(mask))")
    if len(found) and not 0 <= found.min() <= found.max() < samples:
        given = f"rows are from {found.min()} to {found.max()}"
        raise DatasetError(f"{given}: the split has {counted(samples, 'sample')}, numbered from 0")
    if np.any(found[1:] <= found[:-1]):
        raise DatasetError("rows are not in ascending order without duplicates: give np.unique(rows)")
    return found.astype(np.int64)


def _shard_codes(column: Any, shard_paths: Sequence[str]) -> NDArray[np.int32]:
    """Return the position of each row's shard in `shard_paths`, -1 for another shard."""
    known = {path: position for position, path in enumerate(shard_paths)}
    parts = [np.zeros(0, dtype=np.int32)]
    for chunk in column.chunks:
        positions = np.array([known.get(path, -1) for path in chunk.dictionary.to_pylist()], dtype=np.int32)
        parts.append(positions[_to_numpy(chunk.indices)])
    return np.concatenate(parts)


def _keys(column: Any, where: str) -> pa.Array:
    """Return the keys as one array; hashes of them rely on their being short and ASCII."""
    keys = _contiguous(column)
    lengths = pc.min_max(pc.binary_length(keys)).as_py()
    if len(keys) and not (1 <= lengths["min"] <= lengths["max"] <= 64 and pc.all(pc.string_is_ascii(keys)).as_py()):
        raise index_error(where, "column image_id has keys that are not 1 to 64 letters, digits, '_' and '-'")
    return keys


def _to_numpy(column: Any) -> NDArray[Any]:
    """Return a column of numbers without nulls as an array.

    Arrow's own `to_numpy` imports pandas (as does `pq.read_table`), which takes longer than all else before a batch.
    """
    values = _contiguous(column)
    return np.frombuffer(values.buffers()[1] if len(values) else b"", dtype=str(column.type), count=len(values))


def _contiguous(column: Any) -> pa.Array:
    """Return one array with memory of its own: a slice is pickled with everything that it was cut from."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return pa.concat_arrays([*chunks, pa.nulls(0, column.type)])
