"""The rows of one split as arrays: all that reading and ordering its samples needs.

A column of `index.parquet` is decoded when it is first asked for, so that a dataset of a million samples opens in a
fraction of a second. The arrays are shared with forked loader processes, which never write to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.errors import DatasetError
from shards.shared import SharedArrays, can_share

_ARRAYS = ("shard", "offset", "nbytes", "crc32", "width", "height")


class Columns(Protocol):
    """Arrow columns by name: an `IndexFile`, or a table."""

    def __getitem__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class IndexFile:
    """The bytes of `index.parquet`, of which a column is decoded when it is asked for."""

    data: bytes

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        # Not by `pq.read_table`: see `_to_numpy`.
        return pq.ParquetFile(pa.BufferReader(self.data), read_dictionary=["shard", "split"]).read([name])[name]


@dataclass(frozen=True)
class Labels:
    """How many annotations of which class each sample has: list columns, one list a sample.

    Attributes:
        columns: where `classes`, `instances`, `masks` and `groups` come from.
        rows: (N,) the rows of `columns` that are meant, ascending.
    """

    columns: Columns
    rows: NDArray[np.int64]

    @cached_property
    def classes(self) -> NDArray[np.int32]:
        """(P,) the classes of sample 0, then those of sample 1, ...: one entry a pair of a sample and its class."""
        return self.flat("classes")

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """(P,) the sample of each entry of `classes`, 0 to N - 1, ascending."""
        lengths = pc.list_value_length(self._lists("classes")).to_numpy()
        return np.repeat(np.arange(len(self.rows), dtype=np.int64), lengths)

    def flat(self, column: str) -> NDArray[np.int32]:
        """(P,) the entries of a column, in line with `classes`."""
        return np.asarray(pc.list_flatten(self._lists(column)).to_numpy(), dtype=np.int32)

    def take(self, rows: NDArray[np.int64]) -> Labels:
        """Those of some samples, (n,) ascending."""
        return Labels(self.columns, self.rows[rows])

    def _lists(self, column: str) -> Any:
        lists = self.columns[column]
        if len(self.rows) == len(lists):
            return lists
        return lists.combine_chunks().take(pa.array(self.rows))


@dataclass(frozen=True)
class Index:
    """The samples of one split, in the order in which they lie in the shards.

    Attributes:
        shard_paths: the split's shards, in order.
        shard: (N,) position of each sample's shard in `shard_paths`.
        offset: (N,) bytes into the shard.
        nbytes: (N,) length of each sample in its shard.
        crc32: (N,) of each sample's bytes.
        width, height: (N,) pixels.
        image_ids: (N,) Arrow strings, the keys.
        labels: the classes of each sample; None where they are not needed (a loader process is sent none).
        category_ids: the ids under which categories of the shards are handed out; annotations of others are dropped.
            None: all, as they are.
    """

    shard_paths: tuple[str, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    image_ids: Any
    labels: Labels | None = None
    category_ids: Mapping[int, int] | None = None

    def __len__(self) -> int:
        return len(self.shard)

    @classmethod
    def read(cls, columns: Columns, shard_paths: Sequence[str], where: str = "index") -> Index:
        """The rows of some shards.

        Args:
            columns: of the whole dataset, the shards' rows one after the other.
            shard_paths: the shards of one split.
            where: named in errors.

        Raises:
            DatasetError: the rows are not in the order of the shards.
        """
        codes = _shard_codes(columns["shard"], shard_paths)
        rows = np.flatnonzero(codes >= 0)
        shard = codes[rows]
        if len(rows) and (rows[-1] - rows[0] >= len(rows) or np.any(np.diff(shard) < 0)):
            raise DatasetError(f"{where}: its rows are not in the order of the shards: build the dataset again")
        start, end = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)

        def column(name: str, dtype: Any) -> NDArray[Any]:
            return np.ascontiguousarray(_to_numpy(columns[name].slice(start, end - start)), dtype=dtype)

        return cls(
            shard_paths=tuple(shard_paths),
            shard=shard,
            offset=column("offset", np.int64),
            nbytes=column("nbytes", np.int64),
            crc32=column("crc32", np.uint32),
            width=column("width", np.int32),
            height=column("height", np.int32),
            image_ids=_contiguous(columns["image_id"].slice(start, end - start)),
            labels=Labels(columns, rows),
        )

    def image_id(self, row: int) -> str:
        """The key of one row."""
        return str(self.image_ids[int(row)].as_py())

    def take(self, rows: NDArray[np.int64]) -> Index:
        """The index of some of the samples, (n,) rows ascending."""
        arrays = {name: getattr(self, name)[rows] for name in ("shard", "offset", "nbytes", "crc32", "width", "height")}
        return replace(
            self,
            **arrays,
            image_ids=self.image_ids.take(pa.array(rows)),
            labels=None if self.labels is None else self.labels.take(rows),
        )

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "shared"}
        if not can_share():
            return state
        # To a loader process that is being started: the arrays are shared, not sent.
        for name in (*_ARRAYS, "image_ids"):
            del state[name]
        return {**state, "shared": self.shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "shared" in state:
            *arrays, ends, letters = state.pop("shared")
            ids = pa.StringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(letters))
            state |= {**dict(zip(_ARRAYS, arrays)), "image_ids": ids}
        self.__dict__.update(state)

    @cached_property
    def shared(self) -> SharedArrays:
        """A copy of the arrays in memory that processes share."""
        _, ends, letters = _contiguous(self.image_ids).buffers()
        ids = (np.frombuffer(ends, np.int32, len(self) + 1), np.frombuffer(letters, np.uint8))
        return SharedArrays([*(getattr(self, name) for name in _ARRAYS), *ids])

    def without_labels(self) -> Index:
        """What a loader process needs: less to send."""
        return replace(self, labels=None)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any sample, place or length, and with the choice of samples and classes."""
        digest = hashlib.sha256()
        for part in (self.shard, self.offset, self.nbytes, self.crc32):
            digest.update(np.ascontiguousarray(part).tobytes())
        digest.update("\0".join(self.shard_paths).encode())
        if self.category_ids is not None:
            digest.update(repr(sorted(self.category_ids.items())).encode())
        return digest.hexdigest()[:16]

    def counts(self, column: str, categories: Sequence[Any]) -> dict[int, int]:
        """Totals a category id of `instances`, `masks` or `groups`; `images`: the samples that have the class.

        Args:
            column: one of these four.
            categories: with their ids in the shards.
        """
        assert self.labels is not None, "an index without labels counts nothing"
        weights = None if column == "images" else self.labels.flat(column).astype(np.int64)
        least = max((category.id for category in categories), default=0) + 1
        totals = np.bincount(self.labels.classes, weights=weights, minlength=least)
        return {category.id: int(totals[category.id]) for category in categories}


def _shard_codes(column: Any, shard_paths: Sequence[str]) -> NDArray[np.int32]:
    """The position of each row's shard in `shard_paths`, -1 for another."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    known = {path: position for position, path in enumerate(shard_paths)}
    parts = [np.zeros(0, dtype=np.int32)]
    for chunk in column.chunks:
        positions = np.array([known.get(path, -1) for path in chunk.dictionary.to_pylist()], dtype=np.int32)
        parts.append(positions[_to_numpy(chunk.indices)])
    return np.concatenate(parts)


def _to_numpy(column: Any) -> NDArray[Any]:
    """A column of numbers without nulls. Arrow's own `to_numpy` (like `pq.read_table`, and `pa.array` of a list)
    imports pandas where there is one, which takes a quarter of a second: longer than all else before the first batch.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return np.concatenate(
        [np.zeros(0, dtype=str(column.type))]
        + [
            np.frombuffer(chunk.buffers()[1], dtype=str(column.type))[chunk.offset : chunk.offset + len(chunk)]
            for chunk in chunks
            if len(chunk)
        ]
    )


def _contiguous(column: Any) -> pa.Array:
    """One array of its own memory: a slice would be pickled with all that it was cut from."""
    combined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(combined, pa.ChunkedArray):
        combined = combined.chunk(0) if combined.num_chunks else pa.array([], column.type)
    return pa.concat_arrays([combined, combined.slice(0, 0)])
