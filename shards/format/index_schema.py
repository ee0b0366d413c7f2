"""The columns of `index.parquet`, and what is wrong with a file that has others."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

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


def schema_fault(found: pa.Schema) -> str:
    """What the schema of a file lacks of `INDEX_SCHEMA`; "" for nothing. Columns that it has beside are left alone."""
    for item in INDEX_SCHEMA:
        if (times := found.names.count(item.name)) != 1:
            return f"there is no column {item.name}" if not times else f"column {item.name} occurs {times} times"
        kind = found.field(item.name).type
        if not _same(kind, item.type):
            return f"column {item.name} is {kind}, not {item.type}"
    return ""


def column_fault(name: str, column: pa.ChunkedArray) -> str:
    """What a column, whole as it was read, has that it must not have: rows without a value; "" for nothing.

    Raises:
        pyarrow.ArrowInvalid: texts that are not UTF-8.
    """
    if not pa.types.is_list(column.type):
        column.validate(full=True)
    empty = column.null_count
    if pa.types.is_list(column.type):
        empty += sum(chunk.values.null_count for chunk in column.chunks)
    return f"column {name} has rows without a value" if empty else ""


def one_line(error: BaseException) -> str:
    """What Arrow says, which may be many lines."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _same(one: Any, other: Any) -> bool:
    # Whoever wrote the file may call the entries of lists by another name, which is part of Arrow's type.
    if pa.types.is_list(one) and pa.types.is_list(other):
        return bool(one.value_type == other.value_type)
    return bool(one == other)
