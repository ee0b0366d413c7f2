"""Loader processes for a stream: a torch `DataLoader` that raises errors unchanged and counts what it does.

batches = loader(ShardStream(open_dataset("s3://bucket/prefix"), "train", batch_size=8), workers=4)
for batch in batches:
    print(batches.statistics.mb_per_s, batches.statistics.wait_share)
"""

import multiprocessing
import time
from collections.abc import Generator, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.common.argument_checks import whole
from shards.common.errors import DatasetError, LoaderError, UserError
from shards.common.socket_folder import shorten_socket_paths
from shards.stream import batch_transport, torch_internals
from shards.stream.reader import SampleStatistics
from shards.stream.replacements import BadSample
from shards.stream.streams import Stream

T = TypeVar("T")


@dataclass
class LoaderStatistics(SampleStatistics):
    """Running totals of all processes of a loader, as of the newest batch of each.

    `seconds` were spent in the loops over the loader, up to the newest batch; `waited_s` of these waiting for a batch.
    """

    seconds: float = 0.0
    waited_s: float = 0.0

    @property
    def mb_per_s(self) -> float:
        """Megabytes (10^6 bytes) per second received from storage."""
        return self.nbytes / 1e6 / self.seconds if self.seconds else 0.0

    @property
    def samples_per_s(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time, 0 to 1, in which the loop waited for a batch."""
        return self.waited_s / self.seconds if self.seconds else 0.0


class Loader(Generic[T]):
    """The batches of a stream, read by loader processes; `len()` is that of an `EvalStream`.

    Attributes:
        inner: torch's `DataLoader`.
        statistics: running totals, over all loops.
        bad_samples: what was replaced in the batches so far, each sample once; see `ShardStream`'s `skip_bad`.

    Raises:
        LoaderError: a loader process was killed; raised when the loop asks for its next batch, within 5 s.
        UserError: what the stream raises, unchanged.
    """

    def __init__(self, stream: Stream[T], inner: DataLoader) -> None:
        self.inner = inner
        self.statistics = LoaderStatistics()
        self.bad_samples: list[BadSample] = []
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)  # type: ignore[arg-type]  # a TypeError for an endless stream

    def __repr__(self) -> str:
        return f"Loader({self._stream}, workers={self.inner.num_workers})"

    def __iter__(self) -> Generator[T, None, None]:
        before, newest = self.statistics, dict[int, SampleStatistics]()
        waited, began = 0.0, time.perf_counter()
        with torch_internals.running(self.inner) as iterator:
            while True:
                asked = time.perf_counter()
                item: _Item | None = torch_internals.receive(iterator)
                now = time.perf_counter()
                waited += now - asked
                if item is None:
                    return
                if isinstance(item.batch, LoaderError):  # its sender died while it was received
                    raise torch_internals.dead_worker(iterator) or item.batch
                newest[item.worker] = item.statistics
                totals = asdict(sum(newest.values(), SampleStatistics()))
                self.statistics = before + LoaderStatistics(**totals, seconds=now - began, waited_s=waited)
                self.bad_samples += [bad for bad in item.bad_samples if bad not in self.bad_samples]
                if item.error is not None:
                    raise item.error
                yield item.batch
                del item  # the batch is the loop's own


def loader(
    stream: Stream[T], *, workers: int = 0, pin_memory: bool = False, start_method: str | None = None
) -> Loader[T]:
    """Read a stream with loader processes.

    Args:
        stream: a `ShardStream` or an `EvalStream`.
        workers: number of loader processes; 0 reads in this process.
        pin_memory: copy batches into page-locked memory (they need a `pin_memory` method).
        start_method: "fork", "forkserver" or "spawn"; None for the default of the platform.
    """
    if not isinstance(stream, Stream):
        kind = type(stream).__name__
        raise DatasetError(f"a loader reads a stream, not a {kind}: give ShardStream(...) or EvalStream(...)")
    workers = whole("workers", workers, 0)
    methods = multiprocessing.get_all_start_methods()
    if start_method not in (None, *methods):
        raise DatasetError(f"start_method is {start_method!r}: give one of {', '.join(methods)}")
    if workers:
        shorten_socket_paths()
    inner: DataLoader = DataLoader(
        _Reporting(stream),
        batch_size=None,
        collate_fn=_unchanged,  # torch's default would turn the arrays in a batch into tensors
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=start_method if workers else None,
    )
    return Loader(stream, inner)


def _unchanged(item: Any) -> Any:
    return item


class _Item(NamedTuple):
    """What a loader process sends: a batch, or the error that ends the stream; torch pins the elements of a tuple."""

    batch: Any
    error: UserError | None
    worker: int
    statistics: SampleStatistics
    bad_samples: Sequence[BadSample]  # found since the worker's item before


class _Reporting(IterableDataset):
    """A stream whose errors are values: a `DataLoader` would convert them to the text of a traceback."""

    def __init__(self, stream: Stream[Any]) -> None:
        self.stream = stream

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[_Item]:
        info = get_worker_info()
        worker, before = 0 if info is None else info.id, copy(self.stream.statistics)
        found, sent = self.stream.bad_samples, 0
        if info is not None:
            batch_transport.begin()
            torch_internals.ignore_lost_readers()
        try:
            for batch in self.stream:
                batch = batch if info is None else batch_transport.pack(batch)
                yield _Item(batch, None, worker, self.stream.statistics.since(before), found[sent:])
                sent = len(found)
                del batch
        except UserError as error:
            yield _Item(None, error, worker, self.stream.statistics.since(before), found[sent:])
