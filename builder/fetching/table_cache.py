"""A local cache of what was read from the source: Parquet files that are valid while the source does not change.

The cache holds annotation tables (the needed columns of all rows) and the central directories of mask zips, so that
later and resumed builds, of any classes, read neither again. A file is named after the last part of its URL and a hash
of URL and content; the query of a signed URL and passwords are never written to disk. Each file stores the state of the
source when it was read:

- ETag and size, where the store reports an ETag: S3, Google Cloud Storage, most web servers;
- size and time of the last change, where these are reported: local files, some web servers;
- the size alone for a web server that sends neither ETag nor Last-Modified. A change of such a source that keeps its
  length is not noticed; `--no-cache` reads it again.

Files are written atomically, so any number of processes may share a folder. Every page has a checksum: a damaged file
is reported, deleted and read again from the source. A folder that cannot be written causes a warning and no error.

While a table of more than a megabyte is downloaded, what has arrived of it is kept as well, if the store reports an
ETag: a download that is interrupted or killed is resumed while the object has the same ETag
(`builder.fetching.partial_file`).
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from builder.fetching.log_once import warn_once
from builder.fetching.partial_file import PartialFile
from shards.common.text import one_line
from shards.storage.local_files import atomic_write
from shards.storage.location import Location
from shards.storage.reads import Description

FORMAT = 1  # part of every file name: files of other versions of the cache are not read
ROWS = 1 << 18  # at least, in a row group: the unit of writing, reading and filtering, a few tens of MB in memory
SUFFIX, UNFINISHED, PARTIAL = ".parquet", ".tmp", ".part"
# Files of this age belong to processes that were killed; a download may be resumed days later.
ABANDONED_S = {UNFINISHED: 24 * 3600, PARTIAL: 7 * 24 * 3600}
STATE_KEY = b"source"

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """What is read from an object and cached as one table; `name` describes it, for example by the names of columns."""

    location: Location
    description: Description
    name: str
    schema: pa.Schema

    @property
    def file_name(self) -> str:
        """The name of the cache file; the same for all versions of the object."""
        key = hashlib.sha256(json.dumps([FORMAT, self.location.url, self.name]).encode()).hexdigest()[:24]
        name = re.split(r"[?#]", self.location.url)[0].rsplit("/", 1)[-1]
        return f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:80]}-{key}{SUFFIX}"

    @property
    def state(self) -> str:
        """What distinguishes versions of the object, as JSON."""
        state: dict[str, Any] = {"size": self.description.size}
        if self.description.etag:
            state["etag"] = self.description.etag
        elif self.description.changed:
            state["changed"] = self.description.changed
        return json.dumps(state, sort_keys=True)


@dataclass(frozen=True)
class Cache:
    """A folder on a local disk, created when it is first needed; with an empty name, nothing is cached.

    Attributes:
        lasting: whether the folder outlives the process, so that downloads can be resumed.
        known: names of the files that this process has written or read, and need not be logged again.
    """

    folder: str
    lasting: bool = True
    known: set[str] = field(default_factory=set, compare=False, repr=False)

    def read(self, content: Content, use: Callable[[Iterator[pa.Table]], Result]) -> Result | None:
        """Return what `use` makes of the row groups of a file; None without a valid file.

        A damaged file is deleted with a warning; `use` may have seen a part of it by then.
        """
        if not self.folder:
            return None
        path = os.path.join(self.folder, content.file_name)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                found = file.schema_arrow
                if (found.metadata or {}).get(STATE_KEY) != content.state.encode():
                    logger.info("%s: has changed since it was cached: reading it again", content.location)
                    return None
                if not found.remove_metadata().equals(content.schema):
                    raise pa.ArrowInvalid("other columns than were written")
                return use(file.read_row_group(number) for number in range(file.num_row_groups))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (pa.ArrowException, OSError) as error:
            reason = one_line(error)[:200]
            logger.warning("%s: damaged, deleted (%s): reading %s again", path, reason, content.location)
            with suppress(OSError):
                os.unlink(path)
            return None

    def keep(self, content: Content, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield the tables and write them; the file appears once all were consumed. A full disk is a warning."""
        if not self.folder:
            yield from tables
            return
        with _Writer(self.folder, content) as writer:
            for table in tables:
                writer.add(table)
                yield table
        self.known.add(content.file_name)
        with suppress(OSError):  # most have none
            os.unlink(self._partial_path(content))

    def open_partial(self, content: Content) -> PartialFile | None:
        """Open what has arrived of a download; None if it is not kept, or if another process is downloading it.

        It is not kept if the disk has room for less than twice the object's size, because the cache itself comes first.
        """
        etag, size = content.description.etag, content.description.size
        if not self.folder or not self.lasting or not etag or etag.startswith("W/"):  # a weak one may be of other bytes
            return None
        path = self._partial_path(content)
        try:
            room = shutil.disk_usage(self.folder).free + (os.path.getsize(path) if os.path.exists(path) else 0)
        except OSError:
            return None
        return PartialFile.open(path, content.state) if room >= 2 * (size or 0) else None

    def _partial_path(self, content: Content) -> str:
        return os.path.join(self.folder, content.file_name + PARTIAL)


NO_CACHE = Cache("")


class _Writer:
    """Gathers tables to row groups and writes them; does nothing more after the first failure."""

    def __init__(self, folder: str, content: Content) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._parquet: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._metadata = {STATE_KEY: content.state.encode()}
        self._schema = content.schema.with_metadata(self._metadata)
        self._path = os.path.join(folder, content.file_name)

    def __enter__(self) -> Self:
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            _remove_abandoned(self._folder)
            file = self._files.enter_context(atomic_write(self._path))
            self._parquet = self._files.enter_context(
                pq.ParquetWriter(file, self._schema, compression="zstd", write_page_checksum=True, store_schema=True)
            )
        except OSError as error:
            self._give_up(error)
        return self

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        if sum(part.num_rows for part in self._waiting) >= ROWS:
            self._write_waiting()

    def _write_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._parquet is not None and waiting:
            try:
                # One dictionary per row group: with several, Parquet writes the values themselves.
                rows = pa.concat_tables(waiting).replace_schema_metadata(self._metadata).unify_dictionaries()
                self._parquet.write_table(rows)
            except OSError as error:
                self._give_up(error)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._write_waiting()
        try:
            self._files.__exit__(kind, error, trace)
        except OSError as failure:
            if error is None:
                self._give_up(failure)

    def _give_up(self, error: OSError) -> None:
        """Delete the unfinished file and warn."""
        self._parquet = None
        with suppress(OSError):  # closing writes a footer, for which the disk may be too full as well
            self._files.__exit__(type(error), error, error.__traceback__)
        reason = one_line(error)[:200]
        warn_once(
            self._folder,
            "unwritable",
            f"the cache cannot be written ({reason}): continuing without it; free some space there, or choose another "
            "folder with --cache",
        )


def _remove_abandoned(folder: str) -> None:
    """Delete unfinished files of killed processes; those of running processes are younger."""
    for entry in os.scandir(folder):
        if limit := ABANDONED_S.get(os.path.splitext(entry.name)[1]):
            with suppress(OSError):  # another process was faster
                if time.time() - entry.stat().st_mtime > limit:
                    os.unlink(entry.path)
