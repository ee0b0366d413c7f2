"""What was read from the source, kept as Parquet files in a folder of this machine while the source stays the same.

Annotation tables (the columns that are needed, of all rows) and the central directories of mask zips are kept, so that
later builds and resumed ones, of whatever classes, read neither again. A file is named after the last part of its URL
and a hash of URL and content (a signed URL's query or a password never lands on disk), and holds the state of the
source when it was read:

- the ETag and the size where the store tells an ETag: S3, Google Cloud Storage, most web servers;
- the size and the time of the last change where it tells those: local files, some web servers;
- the size alone where nothing else is told: a web server that sends neither ETag nor Last-Modified. A source there
  that changes and keeps its length to the byte goes unnoticed; `--no-cache` reads it anew.

Files are written under a temporary name and renamed when whole, so any number of processes may share a folder. Every
page carries a checksum: a damaged file is told, discarded and read anew. A folder that cannot be written costs a
warning, never the build.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from shards.storage.location import Location
from shards.storage.ranges import Description

FORMAT = 1  # in every name: what another version of this program wrote is not read
ROWS = 1 << 18  # of a row group: the unit of writing, reading and filtering, a few tens of MB in memory
SUFFIX, UNFINISHED = ".parquet", ".tmp"
ABANDONED_S = 24 * 3600  # an unfinished file this old is of a process that was killed
STATE_KEY = b"source"

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def state_of(told: Description) -> str:
    """What tells one version of an object from another, as JSON."""
    state: dict[str, Any] = {"size": told.size}
    if told.etag:
        state["etag"] = told.etag
    elif told.changed:
        state["changed"] = told.changed
    return json.dumps(state, sort_keys=True)


@dataclass(frozen=True)
class Cache:
    """A folder on a disk of this machine; it is made when something is first kept."""

    folder: str

    def entry(self, location: Location, told: Description, content: str) -> Entry:
        """Where something of an object is kept.

        Args:
            location: of the object.
            told: what its store tells of it now.
            content: what of it, for example the columns: each content has a file of its own.
        """
        return Entry(self._path(location, content), location, state_of(told))

    def holds(self, location: Location, content: str) -> bool:
        """Whether something is kept of that, of this or an earlier state of the object; asks nobody."""
        return os.path.exists(self._path(location, content))

    def _path(self, location: Location, content: str) -> str:
        key = hashlib.sha256(json.dumps([FORMAT, location.url, content]).encode()).hexdigest()[:24]
        name = re.split(r"[?#]", location.url)[0].rsplit("/", 1)[-1]
        return os.path.join(self.folder, f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:80]}-{key}{SUFFIX}")


@dataclass(frozen=True)
class Entry:
    """One file of the cache, which may be there or not.

    Attributes:
        path: of the file.
        location: of the object that it was read from.
        state: of that object now, see `state_of`.
    """

    path: str
    location: Location
    state: str

    def read(self, schema: pa.Schema, take: Callable[[Iterator[pa.Table]], Result]) -> Result | None:
        """What `take` makes of the file's row groups; None when there is no file that is whole and up to date.

        A damaged file is deleted, with a line in the log; `take` may then have seen a part of it.
        """
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                found = file.schema_arrow
                if (found.metadata or {}).get(STATE_KEY) != self.state.encode():
                    logger.info("%s: has changed since it was cached: read anew", self.location)
                    return None
                if not found.remove_metadata().equals(schema):
                    raise pa.ArrowInvalid("other columns than were written")
                return take(_row_groups(file))
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            logger.warning("%s: discarded, it cannot be read (%s); %s is read anew", self.path, reason, self.location)
            with suppress(OSError):
                os.unlink(self.path)
            return None

    @contextmanager
    def write(self, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
        """A function to keep table after table with; the file appears when the block ends, unless by an exception.

        That the folder cannot be written, or its disk is full, is told once and is no error.
        """
        writer = _Writer(self, schema.with_metadata({STATE_KEY: self.state}))
        try:
            yield writer.add
            writer.finish()
        finally:
            writer.discard()


def _row_groups(file: pq.ParquetFile) -> Iterator[pa.Table]:
    for number in range(file.num_row_groups):
        yield file.read_row_group(number, use_threads=True)


@dataclass
class _Writer:
    """Gathers tables to whole row groups and writes them, until something fails."""

    entry: Entry
    schema: pa.Schema
    temporary: str = ""
    waiting: list[pa.Table] = field(default_factory=list)
    parquet: pq.ParquetWriter | None = None

    def __post_init__(self) -> None:
        folder = os.path.dirname(self.entry.path)
        with self._forgiving():
            os.makedirs(folder, mode=0o700, exist_ok=True)
            _remove_abandoned(folder)
            handle, self.temporary = tempfile.mkstemp(UNFINISHED, "", folder)
            os.close(handle)
            self.parquet = pq.ParquetWriter(
                self.temporary, self.schema, compression="zstd", write_page_checksum=True, store_schema=True
            )

    def add(self, table: pa.Table) -> None:
        self.waiting.append(table)
        count = sum(part.num_rows for part in self.waiting)
        if count >= ROWS:
            self._write_waiting(count - count % ROWS)

    def finish(self) -> None:
        """Write what waits and give the file its name; a kill before that leaves only an unfinished file."""
        self._write_waiting(ROWS)
        if self.parquet is not None:
            with self._forgiving():
                self.parquet.close()
                os.replace(self.temporary, self.entry.path)
                self.temporary = ""
                logger.debug("%s: kept in %s", self.entry.location, self.entry.path)

    def discard(self) -> None:
        """Remove what was not finished."""
        if self.parquet is not None:
            with suppress(Exception):  # closing writes a footer, for which the disk may be too full as well
                self.parquet.close()
            self.parquet = None
        if self.temporary:
            with suppress(OSError):
                os.unlink(self.temporary)
            self.temporary = ""

    def _write_waiting(self, count: int) -> None:
        if not self.waiting or self.parquet is None:
            self.waiting = []
            return
        # One dictionary for the row group: with several, Parquet writes every value out.
        rows = pa.concat_tables(self.waiting).replace_schema_metadata(self.schema.metadata).unify_dictionaries()
        self.waiting = [rows.slice(count).replace_schema_metadata(None)]
        with self._forgiving():
            self.parquet.write_table(rows.slice(0, count), row_group_size=ROWS)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _warn_once(os.path.dirname(self.entry.path), error)
            self.discard()


_unwritable: set[str] = set()  # folders that the log has told of


def _warn_once(folder: str, error: OSError) -> None:
    if folder not in _unwritable:
        _unwritable.add(folder)
        logger.warning(
            "%s: the cache cannot be written (%s): going on without it; free some space there, or choose another "
            "folder with --cache",
            folder,
            " ".join(str(error).split())[:200],
        )


def _remove_abandoned(folder: str) -> None:
    """Remove unfinished files of processes that were killed; those of running ones are younger."""
    for entry in os.scandir(folder):
        if entry.name.endswith(UNFINISHED):
            with suppress(OSError):  # another process was faster
                if time.time() - entry.stat().st_mtime > ABANDONED_S:
                    os.unlink(entry.path)
