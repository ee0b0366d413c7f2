"""CSV tables streamed block by block and filtered on the way: only the rows that matter are ever held."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from builder.fetch import RangeFile
from shards.errors import UserError
from shards.storage import Location

BLOCK_BYTES = 8 << 20


def read_table(
    location: Location,
    columns: Mapping[str, str],
    where: Mapping[str, pa.Array],
    *,
    newlines_in_values: bool = False,
) -> pa.Table:
    """The rows of a CSV whose value in each column of `where` is one of the values given for it.

    Args:
        location: of the CSV, with a header line; any fsspec URL.
        columns: the columns to keep, with their Arrow types (names as `pyarrow.type_for_alias` takes them). Empty
            numbers become null.
        where: applied in the order given, so put the cheapest and narrowest first.
        newlines_in_values: quoted values may span lines.

    Raises:
        UserError: a column is missing, a value is not of its type, or the file is not such a CSV at all.
        StorageError: it is missing or cannot be read.
    """
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    kept: list[pa.Table] = []
    try:
        with csv.open_csv(
            RangeFile(location),
            read_options=csv.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=csv.ParseOptions(newlines_in_values=newlines_in_values),
            convert_options=csv.ConvertOptions(include_columns=list(columns), column_types=schema),
        ) as batches:
            for batch in batches:
                rows = pa.Table.from_batches([batch])
                for name, values in where.items():
                    rows = rows.filter(pc.is_in(rows[name], value_set=values))
                if rows.num_rows:
                    kept.append(rows)
    except pa.ArrowKeyError as error:
        raise UserError(_missing_column(location, columns)) from error
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"{location}: not the CSV table that is expected ({text}): download it anew, or check --annotations"
        ) from error
    return pa.concat_tables(kept).combine_chunks() if kept else schema.empty_table()


def _missing_column(location: Location, columns: Mapping[str, str]) -> str:
    head = location.read_range(0, min(location.size(), 65536))
    found = [name.strip() for name in head.decode("utf-8-sig", errors="replace").splitlines()[0].split(",")]
    missing = ", ".join(name for name in columns if name not in found)
    return (
        f"{location}: there is no column {missing} (its first line reads {','.join(found)[:200]!r}): "
        "it must be Open Images' own table with its header; check --annotations"
    )
