"""The check of one shard: its bytes, its samples, and what `dataset.json` and the index say about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field, fields

from shards.common.errors import SampleError
from shards.common.text import counted, printable
from shards.format.dataset import DATASET_FILE, Shard
from shards.format.index_schema import IndexRow
from shards.format.sample import Sample
from shards.format.shard_tar import index_row
from shards.format.validation import content_faults
from shards.inspect.shard_scanner import Broken, Found, ShardBytes, walk
from shards.storage.explain import explain
from shards.storage.location import Location


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a shard or another file, whose path is relative to the root."""

    file: str
    what: str
    key: str = ""  # the sample, if it concerns one that is known
    offset: int | None = None  # of the sample in the shard, in bytes

    def __str__(self) -> str:
        key = f" sample {self.key}" if self.key else ""
        offset = f" at offset {self.offset}" if self.offset is not None else ""
        return printable(f"{self.file}:{key}{offset}{':' if key or offset else ''} {self.what}")


@dataclass
class Checked:
    """Counts of what was checked, and the faults."""

    shards: int = 0
    samples: int = 0
    boxes: int = 0
    masks: int = 0  # of the source
    predicted: int = 0  # masks
    nbytes: int = 0
    faults: list[Fault] = field(default_factory=list)

    def add(self, other: Checked) -> None:
        """Add the counts and faults of another part of the dataset."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass(frozen=True)
class ShardCheck:
    """The check of one shard of the dataset at `root`."""

    root: Location
    shard: Shard
    rows: Mapping[str, IndexRow] | None  # of the index by key; None if the index is not to be compared with the shard
    categories: Set[int]  # the ids of the dataset's classes
    paths: Mapping[str, str]  # the path of every shard of the dataset by its sha256

    def run(self, on_bytes: Callable[[int], None]) -> Checked:
        """Read the shard once and check it; `on_bytes` receives the number of bytes of each chunk."""
        checked, index_faults = Checked(shards=1), []
        missing = dict(self.rows or {})  # rows of the index whose samples have not been read yet
        source = ShardBytes(self.root / self.shard.path, self.shard.nbytes, on_bytes)
        try:
            for item in walk(source, sorted(row.offset for row in missing.values())):
                if isinstance(item, Broken):
                    checked.faults.append(self._fault(item.what, item.key, item.offset))
                    continue
                sample = self._check_contents(item, checked)
                if self.rows is not None:
                    found = self._index_faults(item, sample, missing.pop(item.key, None))
                    index_faults += [self._fault(what, item.key, item.offset) for what in found]
        except Exception as error:
            reason = explain(error, str(self.root / self.shard.path))
            if reason is None:
                raise
            unread = self._fault(f"cannot be read: {reason}", offset=source.received or None)
            checked.faults += [*index_faults, unread]
            return checked
        finally:
            source.close()
        checked.nbytes = source.received
        twin = self.paths.get(source.sha256, self.shard.path)
        if source.sha256 != self.shard.sha256 and twin != self.shard.path:
            # No sample matches the index, and one fault says why.
            whole, index_faults = [self._fault(f"it holds the bytes of {twin}: swapped, or copied over it")], []
        else:
            whole = list(self._whole_faults(source, checked))
            absent = "the shard does not hold it, the index does"
            index_faults += [self._fault(absent, key, row.offset) for key, row in missing.items()]
        checked.faults = whole + sorted(checked.faults + index_faults, key=lambda fault: fault.offset or 0)
        return checked

    def _fault(self, what: str, key: str = "", offset: int | None = None) -> Fault:
        return Fault(self.shard.path, what, key, offset)

    def _check_contents(self, found: Found, checked: Checked) -> Sample | None:
        """Count a sample and add the faults of its members; None if it cannot be parsed."""
        checked.samples += 1
        try:
            sample = Sample.from_members(found.key, found.members, check=False)
        except SampleError as error:
            checked.faults.append(self._fault(str(error).partition(": ")[2], found.key, found.offset))
            return None
        checked.boxes += len(sample.instances)
        checked.masks += sum(instance.source_mask is not None for instance in sample.instances)
        checked.predicted += sum(instance.prediction is not None for instance in sample.instances)
        faults = content_faults(sample, found.members["json"], self.categories)
        checked.faults += [self._fault(what, found.key, found.offset) for what in faults]
        if sample.version > self.shard.version:
            what = f"it needs format version {sample.version}, {DATASET_FILE} says {self.shard.version}"
            checked.faults.append(self._fault(what, found.key, found.offset))
        return sample

    def _index_faults(self, found: Found, sample: Sample | None, row: IndexRow | None) -> Iterator[str]:
        if row is None:
            yield "the index does not have it here"
            return
        if row.nbytes != found.nbytes:
            yield f"the index says nbytes {row.nbytes}, the shard has {found.nbytes}"
        if row.crc32 != found.crc32:
            yield f"crc32 is {found.crc32:08x}, the index says {row.crc32:08x}"
        if sample is None:
            return
        actual = index_row(sample, self.shard.split, self.shard.path, found.offset, b"")
        for name in (item.name for item in fields(IndexRow) if item.name not in ("nbytes", "crc32")):
            stated, value = getattr(row, name), getattr(actual, name)
            if stated != value:
                yield f"the index says {name} {_shown(stated)}, the shard has {_shown(value)}"

    def _whole_faults(self, source: ShardBytes, checked: Checked) -> Iterator[Fault]:
        """Compare the length, the sha256 and, without an index, the number of samples with `dataset.json`."""
        stated = self.shard
        if source.received < stated.nbytes:
            what = f"it ends after {source.received} bytes, {DATASET_FILE} says {stated.nbytes}: truncated"
            yield self._fault(what, offset=source.received)
        elif source.received > stated.nbytes:
            yield self._fault(f"it is longer than the {stated.nbytes} bytes that {DATASET_FILE} says")
        elif source.sha256 != stated.sha256:
            yield self._fault(f"sha256 is {source.sha256}, {DATASET_FILE} says {stated.sha256}")
        elif self.rows is None and checked.samples != stated.samples and not checked.faults:
            samples = counted(stated.samples, "sample")
            yield self._fault(f"{DATASET_FILE} says {samples}, the shard has {checked.samples}")


def _shown(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
