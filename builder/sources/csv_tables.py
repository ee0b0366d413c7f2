"""CSV tables streamed block by block and filtered on the way: only the rows that matter are ever held.

What becomes of a table that is not as Open Images ships it:

- read as if it were: a byte order mark; line ends of LF, CRLF or CR; blank lines; quoted values; columns in another
  order, and columns that nobody asked for; spaces around names and values; empty numbers and NaN (null);
- left out, counted, and told in one line a table: rows without an ImageID or a label, such as rows of only commas (and,
  in `builder.sources.openimages.annotations`, impossible ImageIDs and mask names, boxes without an extent, repeated
  rows);
- told in one line: a header without any row; values that hold line ends, where the table may have them;
- an error that names file, fault and remedy: an empty file; no header; a column that is missing or named twice; other
  separators; a row with too few or too many values; a value that is not of its type; text that is not UTF-8; quotes
  that run over line ends, which would swallow rows, where the table has no such values.
"""

from __future__ import annotations

import csv as text_csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from builder.fetching.fetch import Inventory, RangeFile, Request, fetch_one, length_of
from builder.fetching.table_cache import Cache
from shards.common.errors import UserError
from shards.common.text import counted
from shards.storage.location import Location

BLOCK_BYTES = 8 << 20
HEAD_BYTES = 1 << 20  # read first; most tables are no longer
HEADER_BYTES = 64 << 10  # the longest first line
GATHER_ROWS = 1 << 19  # filters of many values, each of which costs building a hash table, wait for so many rows
MANY_VALUES = 1 << 12

# Columns of few distinct values are held as dictionaries until they are filtered, in memory and in the cache.
REPETITIVE = frozenset({"LabelName", "License"})
KEYS = ("ImageID", "LabelName")  # a row that lacks one of them says nothing

logger = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()


def tell_left_out(location: Location, count: int, what: str) -> None:
    """Say in the log how many rows, such as those `without ImageID`, are left out of a table; once a table and reason,
    for a build reads some twice."""
    if count:
        _tell_once(location, what, f"{counted(count, 'row')} {what}: left out")


def _tell_once(location: Location, reason: str, text: str) -> None:
    if (location.url, reason) not in _told:
        _told.add((location.url, reason))
        logger.warning("%s: %s", location, text)


def leave_out(table: pa.Table, good: Callable[[pa.Table], Any], location: Location, what: str) -> pa.Table:
    """The rows for which `good` (a mask for some rows) holds; how many do not is told, as rows `what`.

    It goes block by block and copies none that is good throughout: a table of millions of rows is not held twice.
    """
    parts = []
    for batch in table.to_batches():
        rows = pa.Table.from_batches([batch])
        mask = np.asarray(good(rows))
        parts.append(rows if mask.all() else rows.filter(pa.array(mask)))
    kept = pa.concat_tables(parts) if parts else table
    tell_left_out(location, table.num_rows - kept.num_rows, what)
    return kept


def read_table(
    location: Location,
    columns: Mapping[str, str],
    where: Mapping[str, pa.Array],
    *,
    newlines_in_values: bool = False,
    cache: Cache | None = None,
    inventory: Inventory | None = None,
) -> pa.Table:
    """The rows of a CSV whose value in each column of `where` is one of the values given for it, in the file's order.

    Args:
        location: of the CSV, with a header line; any fsspec URL.
        columns: the columns to keep, with their Arrow types (names as `pyarrow.type_for_alias` takes them). Empty
            numbers become null.
        where: by column; empty strings are among no values.
        newlines_in_values: quoted values may span lines.
        cache: the columns, of all rows, are kept there in passing, and read from there the next time.
        inventory: what is known of the store's objects; the table is the version that it tells of.

    Raises:
        UserError: a column is missing, a value is not of its type, or the file is not such a CSV at all.
        StorageError: it is missing, cannot be read, or was replaced while it was being read.
    """
    declared = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    stored = pa.schema([(field.name, _stored(field)) for field in declared])
    told = (inventory or Inventory()).of(location)
    entry = None if cache is None else cache.entry(location, told, json.dumps(dict(columns)))
    sieve = None if entry is None else entry.read(stored, lambda tables: _Sieve(declared, where).add_all(tables))
    if sieve is not None:
        logger.info("%s: %s from the cache", location, counted(sieve.rows, "row"))
    else:
        sieve = _Sieve(declared, where)
        kept: AbstractContextManager[Callable] = entry.write(stored) if entry else nullcontext(lambda _: None)
        with kept as keep:
            head = fetch_one(Request(location, 0, min(HEAD_BYTES, length_of(location, told)), told.etag))
            file = RangeFile(location, told, {0: head})
            for rows in _stream(file, head, stored, newlines_in_values):
                keep(rows)
                sieve.add(rows)
            file.check_unchanged()
    if not sieve.rows:
        _tell_once(location, "no rows", "holds a header and no rows")
    tell_left_out(location, sieve.blank, f"without {' or '.join(sieve.keys)}")
    return sieve.table()


def _stored(field: pa.Field) -> pa.DataType:
    return pa.dictionary(pa.int32(), field.type) if field.name in REPETITIVE else field.type


class _Sieve:
    """Gathers the rows that pass; `rows` is how many were seen, `blank` how many of them lack one of their `keys`."""

    def __init__(self, schema: pa.Schema, where: Mapping[str, pa.Array]) -> None:
        self.rows = self.blank = 0
        self.keys = [name for name in KEYS if name in schema.names]
        self._schema = schema
        self._where = where
        self._few = [name for name, values in where.items() if len(values) <= MANY_VALUES]
        self._many = [name for name in where if name not in self._few]
        self._gathered: list[pa.Table] = []
        self._passed: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        self.rows += rows.num_rows
        blank = np.zeros(rows.num_rows, np.bool_)
        for name in self.keys:
            blank |= pc.equal(rows[name], "").to_numpy()
        self.blank += int(np.count_nonzero(blank))
        rows = self._narrow(rows, self._few)
        if rows.num_rows:
            self._gathered.append(rows.cast(self._schema))
        if sum(part.num_rows for part in self._gathered) >= GATHER_ROWS:
            self._settle()

    def add_all(self, tables: Iterable[pa.Table]) -> _Sieve:
        for table in tables:
            self.add(table)
        return self

    def table(self) -> pa.Table:
        """All rows that passed, in few chunks."""
        self._settle()
        return pa.concat_tables(self._passed) if self._passed else self._schema.empty_table()

    def _settle(self) -> None:
        if self._gathered:
            rows = pa.concat_tables(self._gathered).combine_chunks()
            self._gathered = []
            self._passed.append(self._narrow(rows, self._many))

    def _narrow(self, rows: pa.Table, names: Iterable[str]) -> pa.Table:
        for name in names:
            rows = rows.filter(pc.is_in(rows[name], value_set=self._where[name]))
        return rows


def _stream(remote: RangeFile, head: bytes, schema: pa.Schema, newlines_in_values: bool) -> Iterator[pa.Table]:
    """The table's blocks, of all rows; see `read_table` for errors. `head` is how it begins."""
    location = remote.location
    names = _read_header(location, head[:HEADER_BYTES], schema.names)
    file = _LineCounter(remote)
    rows = 0
    try:
        with csv.open_csv(
            file,
            read_options=csv.ReadOptions(block_size=BLOCK_BYTES, column_names=names, skip_rows=1),
            parse_options=csv.ParseOptions(newlines_in_values=newlines_in_values),
            convert_options=csv.ConvertOptions(include_columns=schema.names, column_types=schema),
        ) as batches:
            for batch in batches:
                rows += batch.num_rows
                yield _trimmed(pa.Table.from_batches([batch]))
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        if not rows and file.lines <= 1:
            return  # what Arrow says of a header without rows differs with its line end
        raise _not_a_table(location, " ".join(str(error).split())[:300]) from error
    if file.lines != rows + 1:
        found = f"{file.lines} lines make {rows + 1} rows: quoted values run over line ends"
        if not newlines_in_values:
            raise _not_a_table(location, found)
        _tell_once(location, "line ends", f"{found}; if no value should, a quote lacks its partner and swallows rows")


def _trimmed(rows: pa.Table) -> pa.Table:
    for number, name in enumerate(rows.column_names):
        if pa.types.is_string(rows[name].type):
            rows = rows.set_column(number, name, pc.ascii_trim_whitespace(rows[name]))
        elif pa.types.is_dictionary(rows[name].type):
            chunks = [
                pa.DictionaryArray.from_arrays(chunk.indices, pc.ascii_trim_whitespace(chunk.dictionary))
                for chunk in rows[name].chunks
            ]
            rows = rows.set_column(number, name, pa.chunked_array(chunks, rows[name].type))
    return rows


def _read_header(location: Location, head: bytes, wanted: Iterable[str]) -> list[str]:
    """The names of the first line, trimmed; `head` is how the table begins.

    Raises:
        UserError: it is not a header that has each wanted column once.
    """
    line = re.split(rb"[\r\n]", head, maxsplit=1)[0]
    if not head:
        raise _not_a_table(location, "it is empty")
    if len(line) == HEADER_BYTES:
        raise _not_a_table(location, f"its first line is longer than {HEADER_BYTES} bytes")
    try:
        text = line.decode("utf-8-sig")
        [names] = text_csv.reader([text], strict=True) if text.strip() else [[""]]
    except (UnicodeDecodeError, text_csv.Error) as error:
        raise _not_a_table(location, f"its first line is no header: {error}") from error
    names = [name.strip() for name in names]
    if missing := [name for name in wanted if name not in names]:
        raise UserError(
            f"{location}: there is no column {', '.join(missing)} (its first line reads "
            f"{text[:200]!r}{_separated(text)}): it must be Open Images' own table with its header, separated by "
            "commas; check --annotations"
        )
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise _not_a_table(location, f"it has two columns {', '.join(twice)}")
    return names


def _separated(header: str) -> str:
    found = next((mark for mark in ";\t|" if mark in header), "")
    return f", which {found!r} seems to separate" if found else ""


def _not_a_table(location: Location, reason: str) -> UserError:
    return UserError(
        f"{location}: not the CSV table that is expected ({reason}): download it anew, or check --annotations"
    )


class _LineCounter(io.RawIOBase):
    """A file that counts the lines that are not blank while it is read once, from start to end."""

    def __init__(self, file: io.RawIOBase) -> None:
        super().__init__()
        self.lines = 0
        self._file = file
        self._ended = True  # the byte before was a line end, or there was none

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        assert count is not None
        data = np.frombuffer(buffer, np.uint8, count)
        ends = (data == 10) | (data == 13)
        if count:
            self.lines += int(np.count_nonzero(ends[:-1] & ~ends[1:])) + (self._ended and not ends[0])
            self._ended = bool(ends[-1])
        return count
