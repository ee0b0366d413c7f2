"""The columns of `index.parquet`: their types, a row, and the faults of a file that has others."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.common.errors import DatasetError
from shards.common.text import counted, one_line

# Bytes that decoding may take: per file, per row without its classes, and per class of a row.
BYTES_PER_FILE, BYTES_PER_ROW, BYTES_PER_CLASS = 2**20, 512, 32

INDEX_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),  # the shard's path under the root, such as train/000000.tar
        ("offset", pa.int64()),  # of the sample's first tar header in its shard, in bytes
        ("nbytes", pa.int64()),  # of both members with headers and padding; the next sample starts at offset + nbytes
        ("crc32", pa.uint32()),  # of those bytes
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("classes", pa.list_(pa.int32())),  # ids of the classes that have an instance, ascending
        ("instances", pa.list_(pa.int32())),  # for each of `classes`: boxes, with masks or without
        ("masks", pa.list_(pa.int32())),  # for each of `classes`: instances with a mask of the source
        ("groups", pa.list_(pa.int32())),  # for each of `classes`: group-of regions
    ]
)
# For each of `classes`: instances with a predicted mask. Only the index of a dataset with predicted masks has it.
PREDICTED_COLUMN = pa.field("predicted", pa.list_(pa.int32()))


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One row of the index; the columns of `INDEX_SCHEMA`, and `predicted`, which is () for a sample without any."""

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
    predicted: tuple[int, ...] = ()

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> IndexRow:
        """Return a row from JSON or Arrow values, in which tuples are lists."""
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        row = cls(**given)
        return row if row.predicted != (0,) * len(row.classes) else replace(row, predicted=())


def index_bytes(rows: Iterable[IndexRow], shards: Mapping[str, int]) -> bytes:
    """Return the bytes of `index.parquet`, from rows in any order.

    `shards` is the number of samples of every shard by its path, in the order of the index. A DatasetError is raised if
    rows and shards contradict each other, or a key occurs twice.
    """
    position = {path: number for number, path in enumerate(shards)}
    ordered = sorted(rows, key=lambda row: (position.get(row.shard, -1), row.offset))
    counts = Counter(row.shard for row in ordered)
    seen: set[str] = set()
    for row in ordered:
        if row.shard not in position:
            raise DatasetError(f"sample {row.image_id} is in {row.shard}, which is not a shard of this dataset")
        if row.image_id in seen:
            raise DatasetError(f"sample {row.image_id} occurs twice: an ImageID keys one sample of a dataset")
        seen.add(row.image_id)
    for path, samples in shards.items():
        if counts[path] != samples:
            raise DatasetError(f"{path} has {counted(samples, 'sample')}, the index {counts[path]}")
    if not any(row.predicted for row in ordered):
        return parquet_bytes(ordered, INDEX_SCHEMA)
    ordered = [replace(row, predicted=row.predicted or (0,) * len(row.classes)) for row in ordered]
    return parquet_bytes(ordered, INDEX_SCHEMA.append(PREDICTED_COLUMN))


def parquet_bytes(rows: Sequence[Any], schema: pa.Schema) -> bytes:
    """Return the bytes of a Parquet file with a row for each object, whose attributes are the columns of `schema`."""
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def index_error(where: str, fault: str) -> DatasetError:
    """Return the error for an index that is not in the format."""
    return DatasetError(f"{where}: {fault}: build the dataset again")


def size_fault(data: bytes, most_rows: int, classes: int, where: str) -> str:
    """Return why an index is not decoded, "" if it may be: a few bytes of Parquet can hold any number of rows.

    Args:
        data: the bytes of `index.parquet`.
        most_rows: rows that it may have, by `dataset.json`.
        classes: of the dataset, each of which a row names at most once.
        where: named in the DatasetError for data that is not Parquet.
    """
    try:
        about = pq.ParquetFile(pa.BufferReader(data)).metadata
        # Not the columns' metadata: for damaged ones, Arrow 26 aborts the process.
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError) as error:  # a ValueError: names that are not UTF-8
        raise index_error(where, f"is not an index in Parquet ({one_line(error)[:200]})") from error
    rows = max(about.num_rows, sum(group.num_rows for group in groups))
    nbytes = sum(group.total_byte_size for group in groups)
    if rows > most_rows:
        return f"it has {counted(rows, 'row')}, of {counted(most_rows, 'sample')} at most"
    if nbytes > BYTES_PER_FILE + rows * (BYTES_PER_ROW + BYTES_PER_CLASS * classes):
        return f"it has {nbytes} bytes for {counted(rows, 'row')}"
    return ""


def schema_of(found: pa.Schema) -> pa.Schema:
    """Return the columns that an index must have, by the schema of its file: `predicted` is optional."""
    return INDEX_SCHEMA.append(PREDICTED_COLUMN) if PREDICTED_COLUMN.name in found.names else INDEX_SCHEMA


def check_schema(found: pa.Schema, where: str) -> None:
    """Raise a DatasetError if a file's schema lacks a column of `schema_of`; additional columns are ignored."""
    for item in schema_of(found):
        if (times := found.names.count(item.name)) != 1:
            problem = f"column {item.name} occurs {times} times" if times else f"there is no column {item.name}"
            raise index_error(where, problem)
        kind, wanted = found.field(item.name).type, item.type
        if pa.types.is_list(kind) and pa.types.is_list(wanted):
            # Writers differ in the name of a list's entries and in whether they may be null, which is part of the type.
            kind, wanted = kind.value_type, wanted.value_type
        if kind != wanted:
            raise index_error(where, f"column {item.name} is {found.field(item.name).type}, not {item.type}")


def check_column(name: str, column: pa.ChunkedArray, where: str) -> None:
    """Raise a DatasetError if a column has rows without a value, pyarrow.ArrowInvalid if strings are not UTF-8."""
    empty = column.null_count
    if pa.types.is_list(column.type):
        empty += sum(chunk.values.null_count for chunk in column.chunks)
    else:
        column.validate(full=True)
    if empty:
        raise index_error(where, f"column {name} has rows without a value")
