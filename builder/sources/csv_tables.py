"""CSV tables read block by block and filtered on the way, so that only the selected rows are kept in memory.

How deviations from the tables that Open Images publishes are handled:

- read normally: a byte order mark; line ends of LF, CRLF or CR; blank lines; quoted values; columns in another order,
  and further columns; spaces around names and values; empty numbers and NaN (null);
- left out, with one warning per table that counts them: rows without an ImageID or a label, such as rows of commas
  (and, in `builder.sources.openimages.annotations`, impossible ImageIDs and mask names, boxes without an extent,
  repeated rows);
- one warning: a header without rows; values with line ends, in tables where these are allowed;
- an error that names file, fault and remedy: an empty file; no header; a column that is missing or named twice; other
  separators; a row with too few or too many values; a value of the wrong type; text that is not UTF-8; quoted values
  with line ends where these are not allowed, because an unbalanced quote swallows rows.
"""

import csv as text_csv
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from builder.fetching.download import Download
from builder.fetching.fetch import Inventory
from builder.fetching.log_once import warn_once
from builder.fetching.table_cache import NO_CACHE, Cache, Content
from shards.common.errors import UserError
from shards.common.text import counted, one_line
from shards.storage.location import Location

BLOCK_BYTES = 8 << 20
HEADER_BYTES = 64 << 10  # the longest first line
GATHER_ROWS = 1 << 19  # rows gathered before a filter of many values, which builds a hash table each time
MANY_VALUES = 1 << 12

# Columns of few distinct values are dictionary-encoded in memory and in the cache until their rows are selected.
REPETITIVE = frozenset({"LabelName", "License"})
KEYS = ("ImageID", "LabelName")  # a row that lacks one of them is left out

logger = logging.getLogger(__name__)


def warn_left_out(location: Location, count: int, what: str) -> None:
    """Warn, once per table and reason, how many rows (such as those `without ImageID`) are left out."""
    if count:
        warn_once(location.url, what, f"{counted(count, 'row')} {what}: left out")


def leave_out(table: pa.Table, is_good: Callable[[pa.Table], Any], location: Location, what: str) -> pa.Table:
    """Return the rows for which `is_good` is true; the others are counted in a warning, as rows `what`.

    Works block by block and does not copy blocks without bad rows: a table of millions of rows is not held twice.
    """
    parts = []
    for batch in table.to_batches():
        rows = pa.Table.from_batches([batch])
        mask = np.asarray(is_good(rows))  # [rows]
        parts.append(rows if mask.all() else rows.filter(pa.array(mask)))
    kept = pa.concat_tables(parts) if parts else table
    warn_left_out(location, table.num_rows - kept.num_rows, what)
    return kept


def read_table(
    location: Location,
    columns: Mapping[str, str],
    where: Mapping[str, pa.Array],
    *,
    newlines_in_values: bool = False,
    reduce: Callable[[pa.Table], pa.Table] = lambda rows: rows,
    cache: Cache = NO_CACHE,
    inventory: Inventory | None = None,
) -> pa.Table:
    """Return the rows of a CSV whose values in the columns of `where` are among those given, in the file's order.

    Args:
        location: The CSV, which has a header line.
        columns: Columns to read -> their Arrow types, named as in `pyarrow.type_for_alias`. Empty numbers are null.
        where: Column -> selected values. An empty string is never selected.
        newlines_in_values: Quoted values may span lines.
        reduce: Makes a smaller table of the selected rows of each block; the result is all of these tables.
        cache: The cache that keeps the columns of all rows for the next read.
        inventory: Descriptions of objects, among them the version of the table to read.

    Raises:
        UserError: A column is missing, a value is not of its type, or the file is not such a CSV.
    """
    declared = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    coded = {name: pa.dictionary(pa.int32(), pa.string()) for name in REPETITIVE}
    stored = pa.schema([(field.name, coded.get(field.name, field.type)) for field in declared])
    content = Content(location, (inventory or Inventory()).of(location), json.dumps(dict(columns)), stored)
    selection = cache.read(content, lambda tables: _Selection(declared, where, reduce).add_all(tables))
    if selection is not None:
        if content.file_name not in cache.known:
            cache.known.add(content.file_name)
            logger.info("%s: %s from the cache", location, counted(selection.rows, "row"))
    else:
        tables = cache.keep(content, _stream(content, newlines_in_values, cache))
        selection = _Selection(declared, where, reduce).add_all(tables)
    if not selection.rows:
        warn_once(location.url, "no rows", "has a header and no rows")
    warn_left_out(location, selection.incomplete, f"without {' or '.join(selection.keys)}")
    return selection.table()


class _Selection:
    """Gathers the selected rows of a table; counts the `rows` seen and those `incomplete`, which lack one of `keys`."""

    def __init__(
        self, schema: pa.Schema, where: Mapping[str, pa.Array], reduce: Callable[[pa.Table], pa.Table]
    ) -> None:
        self.rows = self.incomplete = 0
        self.keys = [name for name in KEYS if name in schema.names]
        self._schema = schema
        self._where = where
        self._reduce = reduce
        self._few = [name for name, values in where.items() if len(values) <= MANY_VALUES]
        self._many = [name for name in where if name not in self._few]
        self._gathered: list[pa.Table] = []
        self._selected: list[pa.Table] = []

    def add_all(self, tables: Iterable[pa.Table]) -> Self:
        for rows in tables:
            self.rows += rows.num_rows
            incomplete = np.zeros(rows.num_rows, np.bool_)
            for name in self.keys:
                incomplete |= pc.equal(rows[name], "").to_numpy()
            self.incomplete += int(np.count_nonzero(incomplete))
            rows = self._filter(rows, self._few)
            if rows.num_rows:
                self._gathered.append(rows.cast(self._schema))
            if sum(part.num_rows for part in self._gathered) >= GATHER_ROWS:
                self._select_gathered()
        return self

    def table(self) -> pa.Table:
        """All selected rows, in few chunks."""
        self._select_gathered()
        return pa.concat_tables(self._selected or [self._reduce(self._schema.empty_table())])

    def _select_gathered(self) -> None:
        if self._gathered:
            rows = pa.concat_tables(self._gathered).combine_chunks()
            self._gathered = []
            self._selected.append(self._reduce(self._filter(rows, self._many)))

    def _filter(self, rows: pa.Table, names: Iterable[str]) -> pa.Table:
        for name in names:
            rows = rows.filter(pc.is_in(rows[name], value_set=self._where[name]))
        return rows


def _stream(content: Content, newlines_in_values: bool, cache: Cache) -> Iterator[pa.Table]:
    """Yield all rows of a CSV, block by block; see `read_table` for errors."""
    with _LineCounter(content.location, content.description, partial(cache.open_partial, content)) as file:
        yield from _parse(file, content.schema, newlines_in_values)
        file.check_unchanged()


def _parse(file: "_LineCounter", schema: pa.Schema, newlines_in_values: bool) -> Iterator[pa.Table]:
    location = file.location
    names = _read_header(location, file.kept[:HEADER_BYTES], schema.names)
    if len(file.kept) == file.length and not re.search(rb"[\r\n][^\r\n]", file.kept):
        return  # no rows: whether Arrow raises an error for a header alone depends on its line end
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
        raise _not_a_table(location, one_line(error)[:300]) from error
    if file.lines != rows + 1:
        found = f"{file.lines} lines make {rows + 1} rows: quoted values contain line ends"
        if not newlines_in_values:
            raise _not_a_table(location, found)
        warn_once(location.url, "line ends", f"{found}; if no value should, an unbalanced quote swallows rows")


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
    """Return the trimmed names of the first line, which has each wanted column once."""
    line = re.split(rb"[\r\n]", head, maxsplit=1)[0]
    if not head:
        raise _not_a_table(location, "it is empty")
    if len(line) == HEADER_BYTES:
        raise _not_a_table(location, f"its first line is longer than {HEADER_BYTES} bytes")
    try:
        text = line.decode("utf-8-sig")
        [names] = text_csv.reader([text], strict=True) if text.strip() else [[""]]
    except (UnicodeDecodeError, text_csv.Error) as error:
        raise _not_a_table(location, f"its first line is not a header: {error}") from error
    names = [name.strip() for name in names]
    if missing := [name for name in wanted if name not in names]:
        mark = next((mark for mark in ";\t|" if mark in text), "")
        separated = f", which seems to be separated by {mark!r}" if mark else ""
        raise UserError(
            f"{location}: there is no column {', '.join(missing)} (its first line is {text[:200]!r}{separated}): it "
            "must be a table of Open Images with its header, separated by commas; check --annotations"
        )
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise _not_a_table(location, f"it has two columns {', '.join(twice)}")
    return names


def _not_a_table(location: Location, reason: str) -> UserError:
    return UserError(f"{location}: not the expected CSV table ({reason}): download it again, or check --annotations")


class _LineCounter(Download):
    """Counts the non-blank lines of a file that is read once, from start to end."""

    lines = 0
    _after_line_end = True  # or at the start of the file

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        if count:
            data = np.frombuffer(buffer, np.uint8, count)
            ends = (data == 10) | (data == 13)  # [count]
            starts = np.count_nonzero(ends[:-1] & ~ends[1:]) + (self._after_line_end and not ends[0])
            self.lines += int(starts)
            self._after_line_end = bool(ends[-1])
        return count
