"""Everything a dataset promises, checked against every byte of it: `inspect-shards --verify`.

Several shards are read at a time, each once and from the front (`shards.inspect.shard_scanner`); what is found is
compared with
`dataset.json`, with the index and with the format. Beside the index, memory holds two chunks and one sample a shard.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.common.errors import DatasetError, SampleError, StorageError
from shards.common.text import counted, printable, shown
from shards.format.dataset import DATASET_FILE, INDEX_FILE, SPLITS, DatasetInfo, IndexRow, Shard, read_value
from shards.format.index import IndexFile
from shards.format.sample import Sample
from shards.format.validation import content_faults
from shards.format.writer import index_row
from shards.inspect.shard_scanner import Broken, Found, ShardBytes, walk
from shards.storage.explain import explain
from shards.storage.location import Location

SHARDS_AT_ONCE = 4
SHARD_NAME = r"[0-9]{6}\.tar"
MAX_DEPTH = 5  # of folders in which stray shards are looked for: a link may lead back to the first


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        file: the shard's path below the root, or another file's.
        what: what is wrong with it.
        key: the sample; "" where it concerns none, or it is not known which.
        offset: of the sample in the shard, in bytes; None where it concerns none.
    """

    file: str
    what: str
    key: str = ""
    offset: int | None = None

    def __str__(self) -> str:
        key = f" sample {self.key}" if self.key else ""
        offset = f" at offset {self.offset}" if self.offset is not None else ""
        return printable(f"{self.file}:{key}{offset}{':' if key or offset else ''} {self.what}")


@dataclass
class Checked:
    """What was looked at, and what is wrong with it."""

    shards: int = 0
    samples: int = 0
    boxes: int = 0
    masks: int = 0
    nbytes: int = 0
    faults: list[Fault] = field(default_factory=list)

    def add(self, other: Checked) -> None:
        """Count what another has counted; its faults are left to it."""
        for name in ("shards", "samples", "boxes", "masks", "nbytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Verification:
    """The check of one dataset.

    Args:
        root: where it lies.

    Attributes:
        info: what `dataset.json` says.
        total: the bytes that its shards should have.
        note: what could not be looked for, and why; "" for nothing.

    Raises:
        DatasetError, StorageError: there is no `dataset.json` that could be checked.
    """

    def __init__(self, root: Location) -> None:
        self.root = root
        self._told = read_value(root)
        self.info = DatasetInfo.from_json(self._told, str(root / DATASET_FILE))
        self.total = sum(shard.nbytes for shard in self.info.shards)
        self.note = ""
        self._categories = frozenset(category.id for category in self.info.categories)

    def run(self, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[Checked]:
        """Check everything: first the dataset as a whole, then shard after shard, in the order of `dataset.json`.

        Args:
            on_bytes: told how many bytes of shards have come; called from one thread at a time.
        """
        faults: list[Fault] = list(self._info_faults())
        table = self._read_index(faults)
        rows = {} if table is None else _rows_by_shard(table, [shard.path for shard in self.info.shards])
        if table is not None:
            faults.extend(_index_faults(table, self.info.shards, rows))
        faults.extend(self._extra_shards())
        yield Checked(faults=faults)
        lock, stopped = threading.Lock(), threading.Event()

        def count(nbytes: int) -> None:
            if stopped.is_set():
                raise CancelledError  # nobody waits for the rest of the shard
            with lock:
                on_bytes(nbytes)

        def check(shard: Shard) -> Checked:
            # What the index has nothing of was told above: not once more for each sample.
            known = table is not None and len(rows[shard.path])
            return self._check_shard(shard, _index_rows(table, rows[shard.path]) if known else None, count)

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
        # What readers leave alone: it says again what the list of shards says.
        told, is_so = self._told.get("splits"), self.info.to_json()["splits"]
        if not isinstance(told, dict) or told.keys() != is_so.keys():
            yield Fault(DATASET_FILE, f"splits are {shown(told)}, its shards are of {', '.join(is_so) or 'none'}")
            return
        for split in is_so:
            if told[split] != is_so[split]:
                yield Fault(DATASET_FILE, f"split {split} is {shown(told[split])}, its shards have {is_so[split]}")

    def _read_index(self, faults: list[Fault]) -> pa.Table | None:
        """The index, or None where it cannot be read; what is wrong with it is added to `faults`."""
        try:
            data = (self.root / INDEX_FILE).read()
            found = hashlib.sha256(data).hexdigest()
            if found != self.info.index_sha256:
                faults.append(Fault(INDEX_FILE, f"sha256 is {found}, {DATASET_FILE} says {self.info.index_sha256}"))
            return IndexFile(data, INDEX_FILE).table()
        except StorageError as error:
            faults.append(Fault(INDEX_FILE, f"cannot be read: {error}"))
        except DatasetError as error:
            faults.append(Fault(INDEX_FILE, str(error).partition(": ")[2]))
        return None

    def _extra_shards(self) -> Iterator[Fault]:
        known = {shard.path for shard in self.info.shards}
        if self.root.protocol in ("http", "https"):
            self.note = (
                f"{self.root}: http tells no listing: shards that {DATASET_FILE} does not name were not looked for"
            )
            return
        for split in SPLITS:
            place = self.root / split
            try:
                paths = [f"{split}/{path}" for path in _tars_below(place)]
            except FileNotFoundError:
                continue
            except Exception as error:
                reason = explain(error, str(place))
                if reason is None:
                    raise
                self.note = f"{reason}: shards that {DATASET_FILE} does not name were not looked for"
                return
            for path in sorted(set(paths) - known):
                yield Fault(path, f"is not in {DATASET_FILE}: of another build?")

    def _check_shard(
        self, shard: Shard, rows: Mapping[str, IndexRow] | None, on_bytes: Callable[[int], None]
    ) -> Checked:
        """Read one shard; `rows` are the index's of it, None where it is not to be compared with them."""
        checked = Checked(shards=1)
        against_index: list[Fault] = []
        source = ShardBytes(self.root / shard.path, shard.nbytes, on_bytes)
        missing = dict(rows or {})
        try:
            for item in walk(source, sorted(row.offset for row in missing.values())):
                if isinstance(item, Broken):
                    checked.faults.append(Fault(shard.path, item.what, item.key, item.offset))
                    continue
                checked.samples += 1
                row = missing.pop(item.key, None)
                if rows is not None:
                    against_index.extend(_crc_faults(item, row, shard.path))
                self._check_sample(item, row, shard, checked, against_index)
        except Exception as error:
            reason = explain(error, str(self.root / shard.path))
            if reason is None:
                raise
            checked.faults += [
                *against_index,
                Fault(shard.path, f"cannot be read: {reason}", "", source.received or None),
            ]
            return checked
        finally:
            source.close()
        checked.nbytes = source.received
        whole = list(self._whole_faults(shard, source))
        if rows is None and checked.samples != shard.samples and not whole and not checked.faults:
            told = f"{DATASET_FILE} says {counted(shard.samples, 'sample')}, the shard has {checked.samples}"
            whole.append(Fault(shard.path, told))
        twin = next((other.path for other in self.info.shards if other.sha256 == source.sha256 != shard.sha256), None)
        if twin is not None:
            # Every sample of it is at odds with the index: one line says why.
            whole, against_index, missing = (
                [Fault(shard.path, f"it holds the bytes of {twin}: swapped, or copied over it")],
                [],
                {},
            )
        against_index += [
            Fault(shard.path, "the shard does not hold it, the index does", key, row.offset)
            for key, row in missing.items()
        ]
        checked.faults = whole + sorted(checked.faults + against_index, key=lambda fault: fault.offset or 0)
        return checked

    def _whole_faults(self, shard: Shard, source: ShardBytes) -> Iterator[Fault]:
        if source.received < shard.nbytes:
            told = f"it ends after {source.received} bytes, {DATASET_FILE} says {shard.nbytes}: truncated"
            yield Fault(shard.path, told, offset=source.received)
        elif source.received > shard.nbytes:
            yield Fault(shard.path, f"it is longer than the {shard.nbytes} bytes that {DATASET_FILE} says")
        elif source.sha256 != shard.sha256:
            yield Fault(shard.path, f"sha256 is {source.sha256}, {DATASET_FILE} says {shard.sha256}")

    def _check_sample(
        self, found: Found, row: IndexRow | None, shard: Shard, checked: Checked, against_index: list[Fault]
    ) -> None:
        def fault(what: str) -> Fault:
            return Fault(shard.path, what, found.key, found.offset)

        try:
            sample = Sample.from_members(found.key, {"jpg": found.jpg, "json": found.json})
        except SampleError as error:
            checked.faults.append(fault(str(error).partition(": ")[2]))
            return
        checked.boxes += len(sample.instances)
        checked.masks += sum(instance.segmentation is not None for instance in sample.instances)
        checked.faults.extend(map(fault, content_faults(sample, found.json, self._categories)))
        if row is None:
            return
        real = index_row(sample, shard.split, shard.path, found.offset, b"")
        for name in (item.name for item in fields(IndexRow) if item.name not in ("nbytes", "crc32")):
            told, is_so = getattr(row, name), getattr(real, name)
            if told != is_so:
                against_index.append(fault(f"the index says {name} {_shown(told)}, the shard has {_shown(is_so)}"))


def _tars_below(place: Location) -> Iterator[str]:
    """The tars in a folder and in those below it, as paths from there; the file system's own errors."""
    start = place.path.rstrip("/") + "/"
    for folder, _, names in place.fs.walk(place.path, maxdepth=MAX_DEPTH, on_error="raise"):
        for name in names:
            if name.endswith(".tar"):
                yield f"{folder}/{name}".removeprefix(start)


def _crc_faults(found: Found, row: IndexRow | None, path: str) -> Iterator[Fault]:
    if row is None:
        yield Fault(path, "the index does not have it here", found.key, found.offset)
        return
    if row.nbytes != found.nbytes:
        told = f"the index says nbytes {row.nbytes}, the shard has {found.nbytes}"
        yield Fault(path, told, found.key, found.offset)
    if row.crc32 != found.crc32:
        told = f"crc32 is {found.crc32:08x}, the index says {row.crc32:08x}"
        yield Fault(path, told, found.key, found.offset)


def _rows_by_shard(table: pa.Table, paths: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """The numbers of each shard's rows, ascending; "" collects those of shards that are not in `paths`."""
    positions = {path: number for number, path in enumerate(paths)}
    encoded = table["shard"].combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    known = np.array([positions.get(path, len(paths)) for path in encoded.dictionary.to_pylist()] or [0], np.int64)
    codes = known[encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)] if len(table) else np.zeros(0, np.int64)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(paths) + 2))
    names = [*paths, ""]
    return {name: order[bounds[number] : bounds[number + 1]] for number, name in enumerate(names)}


def _index_faults(table: pa.Table, shards: Sequence[Shard], rows: Mapping[str, NDArray[np.int64]]) -> Iterator[Fault]:
    for path, number in sorted(Counter(table["shard"].take(pa.array(rows[""])).to_pylist()).items()):
        yield Fault(INDEX_FILE, f"{counted(number, 'row')} of {path}, which is not a shard of {DATASET_FILE}")
    counts = table["image_id"].value_counts()
    for value in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist():
        yield Fault(INDEX_FILE, f"occurs in {value['counts']} rows", str(value["values"]))
    last = -1
    for shard in shards:
        mine = rows[shard.path]
        if len(mine) != shard.samples:
            told = f"{DATASET_FILE} says {counted(shard.samples, 'sample')}, the index has {len(mine)}"
            yield Fault(shard.path, told)
        offsets = table["offset"].take(pa.array(mine)).to_numpy()
        if len(mine) and (mine[0] <= last or np.any(np.diff(mine) != 1) or np.any(np.diff(offsets) <= 0)):
            yield Fault(INDEX_FILE, f"the rows of {shard.path} are not in the order of the shards and offsets")
        last = int(mine[-1]) if len(mine) else last


def _index_rows(table: pa.Table, rows: NDArray[np.int64]) -> dict[str, IndexRow]:
    values = table.take(pa.array(rows)).to_pylist()
    lists = ("classes", "instances", "masks", "groups")
    return {
        str(value["image_id"]): IndexRow(**{**value, **{name: tuple(value[name] or ()) for name in lists}})
        for value in values
    }


def _shown(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
