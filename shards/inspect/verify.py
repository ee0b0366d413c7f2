"""The check of every byte of a dataset, `inspect-shards --verify`, in memory for the index and a few chunks."""

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.common.errors import DatasetError, StorageError
from shards.common.text import counted, shown
from shards.format.dataset import DATASET_FILE, INDEX_FILE, SPLITS, DatasetInfo, Shard, read_value
from shards.format.index import IndexFile
from shards.format.index_schema import IndexRow, size_fault
from shards.inspect.shard_check import Checked, Fault, ShardCheck
from shards.storage.explain import explain
from shards.storage.location import Location

SHARDS_AT_ONCE = 4
SHARD_NAME = r"[0-9]{6}\.tar"
MAX_DEPTH = 5  # levels of folders that are searched for extra shards: a link may lead back to the first


class Verification:
    """The check of one dataset; a DatasetError or StorageError if there is no `dataset.json` that can be checked."""

    def __init__(self, root: Location) -> None:
        self.root = root
        self._value = read_value(root)
        self.info = DatasetInfo.from_json(self._value, str(root / DATASET_FILE))
        self.total = sum(shard.nbytes for shard in self.info.shards)  # bytes that the shards should have
        self.note = ""  # what could not be checked, and why

    def run(self, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[Checked]:
        """Check the dataset as a whole, then each shard in the order of `dataset.json`.

        `on_bytes` receives the number of bytes of each chunk of a shard; it is called by one thread at a time.
        """
        faults = list(self._info_faults())
        table = self._read_index(faults)
        rows: dict[str, NDArray[np.int64]] = {}
        if table is not None:
            shards = table.select(["shard"]).to_pandas(categories=["shard"])["shard"]
            rows = shards.groupby(shards, observed=True).indices  # row numbers, ascending
            faults += _index_faults(table, self.info.shards, rows)
        faults += self._extra_shards()
        yield Checked(faults=faults)
        categories = frozenset(category.id for category in self.info.categories)
        paths = {shard.sha256: shard.path for shard in reversed(self.info.shards)}
        lock, stopped = threading.Lock(), threading.Event()

        def count(nbytes: int) -> None:
            if stopped.is_set():
                raise CancelledError  # the caller does not wait for the rest of the shard
            with lock:
                on_bytes(nbytes)

        def check(shard: Shard) -> Checked:
            # A shard that the index does not have is one fault above, not one per sample.
            known = None
            if table is not None and shard.path in rows:
                own = map(IndexRow.from_values, table.take(pa.array(rows[shard.path])).to_pylist())
                known = {row.image_id: row for row in own}
            return ShardCheck(self.root, shard, known, categories, paths).run(count)

        pool = ThreadPoolExecutor(SHARDS_AT_ONCE)
        try:
            yield from pool.map(check, self.info.shards)
        finally:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _info_faults(self) -> Iterator[Fault]:
        for name, values in (
            ("class id", [category.id for category in self.info.categories]),
            ("shard", [shard.path for shard in self.info.shards]),
        ):
            for value, times in Counter(values).items():
                if times > 1:
                    yield Fault(DATASET_FILE, f"{name} {value} occurs {times} times")
        for shard in self.info.shards:
            if not re.fullmatch(f"{shard.split}/{SHARD_NAME}", shard.path):
                yield Fault(DATASET_FILE, f"{shard.path} is not a shard's path, {shard.split}/ and six digits")
        # Readers do not use the splits, which repeat what the list of shards says.
        stated, actual = self._value.get("splits"), self.info.to_json()["splits"]
        if not isinstance(stated, dict) or stated.keys() != actual.keys():
            yield Fault(DATASET_FILE, f"splits are {shown(stated)}, its shards are of {', '.join(actual) or 'none'}")
            return
        for split in actual:
            if stated[split] != actual[split]:
                yield Fault(DATASET_FILE, f"split {split} is {shown(stated[split])}, its shards have {actual[split]}")

    def _read_index(self, faults: list[Fault]) -> pa.Table | None:
        """Return the index, or None if it cannot be read; its faults are added to `faults`."""
        try:
            data = (self.root / INDEX_FILE).read()
            found = hashlib.sha256(data).hexdigest()
            if found != self.info.index_sha256:
                faults.append(Fault(INDEX_FILE, f"sha256 is {found}, {DATASET_FILE} says {self.info.index_sha256}"))
            # Up to twice the rows are a fault of some shards, which is reported for each of them.
            most = 2 * sum(shard.samples for shard in self.info.shards) + 1000
            if fault := size_fault(data, most, len(self.info.categories), INDEX_FILE):
                faults.append(Fault(INDEX_FILE, fault))
                return None
            return IndexFile(data, INDEX_FILE).table()
        except StorageError as error:
            faults.append(Fault(INDEX_FILE, f"cannot be read: {error}"))
        except DatasetError as error:
            faults.append(Fault(INDEX_FILE, str(error).partition(": ")[2]))
        return None

    def _extra_shards(self) -> Iterator[Fault]:
        """Find shards that `dataset.json` does not name; if they cannot be listed, `note` says so."""
        skipped = f"shards that {DATASET_FILE} does not name were not looked for"
        if self.root.protocol in ("http", "https"):
            self.note = f"{self.root}: http has no listing: {skipped}"
            return
        known = {shard.path for shard in self.info.shards}
        for split in SPLITS:
            folder = self.root / split
            try:
                paths = {f"{split}/{path}" for path in _tars_below(folder)}
            except FileNotFoundError:
                continue
            except Exception as error:
                reason = explain(error, str(folder))
                if reason is None:
                    raise
                self.note = f"{reason}: {skipped}"
                return
            for path in sorted(paths - known):
                yield Fault(path, f"is not in {DATASET_FILE}: of another build?")


def _tars_below(folder: Location) -> Iterator[str]:
    """Yield the tars in a folder and its subfolders, as relative paths; raises the file system's own errors."""
    start = folder.path.rstrip("/") + "/"
    for parent, _, names in folder.fs.walk(folder.path, maxdepth=MAX_DEPTH, on_error="raise"):
        for name in names:
            if name.endswith(".tar"):
                yield f"{parent}/{name}".removeprefix(start)


def _index_faults(table: pa.Table, shards: Sequence[Shard], rows: Mapping[str, NDArray[np.int64]]) -> Iterator[Fault]:
    for path in sorted(rows.keys() - {shard.path for shard in shards}):
        number = counted(len(rows[path]), "row")
        yield Fault(INDEX_FILE, f"{number} of {path}, which is not a shard of {DATASET_FILE}")
    counts = table["image_id"].value_counts()
    for value in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist():
        yield Fault(INDEX_FILE, f"occurs in {value['counts']} rows", str(value["values"]))
    last = -1
    for shard in shards:
        own = rows.get(shard.path, np.zeros(0, np.int64))
        if len(own) != shard.samples:
            samples = counted(shard.samples, "sample")
            yield Fault(shard.path, f"{DATASET_FILE} says {samples}, the index has {len(own)}")
        if not len(own):
            continue
        offsets = table["offset"].take(pa.array(own)).to_numpy()
        if own[0] <= last or np.any(np.diff(own) != 1) or np.any(np.diff(offsets) <= 0):
            yield Fault(INDEX_FILE, f"the rows of {shard.path} are not in the order of the shards and offsets")
        last = int(own[-1])
