"""Loader processes for a stream: a torch `DataLoader` whose errors arrive as themselves, and that counts what it does.

batches = loader(ShardStream(open_dataset("s3://bucket/prefix"), "train", batch_size=8), workers=4)
for batch in batches:
    ...
    print(batches.statistics.mb_per_s, batches.statistics.wait_share)
"""

from __future__ import annotations

import multiprocessing
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, astuple, dataclass
from operator import add, sub
from typing import Any, Generic, NamedTuple, TypeVar

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.common.argument_checks import whole
from shards.common.errors import DatasetError, LoaderError, UserError
from shards.stream import batch_transport as handover
from shards.stream.reader import SampleStatistics
from shards.stream.streams import Stream

T = TypeVar("T")


@dataclass(frozen=True)
class LoaderStatistics:
    """What a loader did so far, all its processes together, as they told with the newest batch of each.

    Attributes:
        samples: in the batches handed over.
        cache_hits: those of them that came from the cache.
        requests, nbytes, retries: of storage: requests sent, bytes received, requests that had to be repeated or
            continued.
        seconds: spent in its loops, up to the newest batch.
        waited_s: seconds of these in which the loop waited for a batch.
    """

    samples: int = 0
    cache_hits: int = 0
    requests: int = 0
    nbytes: int = 0
    retries: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0

    @property
    def mb_per_s(self) -> float:
        """Million bytes a second that came from storage."""
        return self.nbytes / 1e6 / self.seconds if self.seconds else 0.0

    @property
    def samples_per_s(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time, 0 to 1, in which the loop waited for a batch."""
        return self.waited_s / self.seconds if self.seconds else 0.0

    def __add__(self, other: LoaderStatistics) -> LoaderStatistics:
        return LoaderStatistics(*map(add, astuple(self), astuple(other)))

    def since(self, before: LoaderStatistics) -> LoaderStatistics:
        """What was done after `before` was taken."""
        return LoaderStatistics(*map(sub, astuple(self), astuple(before)))


class Loader(Generic[T]):
    """The batches of a stream, read by loader processes.

    Raises:
        LoaderError: a loader process was killed; where the loop asks for its next batch, within 5 s.
        UserError: what the stream raises, as itself.
    """

    def __init__(self, inner: DataLoader) -> None:
        self.inner = inner
        self.statistics = LoaderStatistics()

    def __iter__(self) -> Iterator[T]:
        before, newest = self.statistics, dict[int, SampleStatistics]()
        waited, began = 0.0, time.perf_counter()
        iterator = iter(self.inner)
        _note_deaths()
        try:
            while True:
                asked = time.perf_counter()
                item = _next(iterator)
                now = time.perf_counter()
                waited += now - asked
                if item is None:
                    return
                newest[item.worker] = item.statistics
                totals = asdict(sum(newest.values(), SampleStatistics()))
                self.statistics = before + LoaderStatistics(**totals, seconds=now - began, waited_s=waited)
                if item.error is not None:
                    raise item.error
                yield item.batch
                del item
        finally:
            # Here and now. An exception may keep the iterator alive until the collector finds it, which closes the
            # workers' queues before they are told to end: each is then waited for 5 s.
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()
            _noted(iterator)


def loader(
    stream: Stream[T],
    *,
    workers: int = 0,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Loader[T]:
    """Read a stream with loader processes.

    Args:
        stream: a `ShardStream` or an `EvalStream`.
        workers: loader processes; 0 reads in this one.
        pin_memory: copy batches into page-locked memory (they need a `pin_memory` method).
        start_method: "fork", "forkserver" or "spawn". Default: the platform's. With "fork" the index is shared and
            not copied; each process opens connections of its own.

    Raises:
        DatasetError: it is no stream, `workers` no whole number from 0 on, or there is no such `start_method`.
    """
    if not isinstance(stream, Stream):
        kind = type(stream).__name__
        raise DatasetError(f"a loader reads a stream, not a {kind}: give ShardStream(...) or EvalStream(...)")
    workers = whole("workers", workers)
    if workers < 0:
        raise DatasetError(f"workers is {workers}: it must be 0 or more")
    methods = multiprocessing.get_all_start_methods()
    if start_method not in (None, *methods):
        raise DatasetError(f"start_method is {start_method!r}: give one of {', '.join(methods)}")
    inner: DataLoader = DataLoader(
        _Reporting(stream),
        batch_size=None,
        collate_fn=_as_it_is,  # torch's own would turn the arrays in a batch into tensors
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=start_method if workers else None,
    )
    return Loader(inner)


def _as_it_is(item: Any) -> Any:
    return item


class _Item(NamedTuple):
    """What a loader process sends: a batch, or the error that ends the stream; and what it has done until now.

    A named tuple: torch pins the memory of what is in it.
    """

    batch: Any
    error: UserError | None
    worker: int
    statistics: SampleStatistics


class _Reporting(IterableDataset):
    """Hands errors over as values: a `DataLoader` would wrap them into the text of a traceback."""

    def __init__(self, stream: Stream[Any]) -> None:
        self.stream = stream

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[_Item]:
        info = get_worker_info()
        worker, before = 0 if info is None else info.id, copy(self.stream.statistics)
        if info is not None:
            handover.begin()
            _keep_quiet_about_readers()
        try:
            for batch in self.stream:
                batch = handover.pack(batch)
                yield _Item(batch, None, worker, self.stream.statistics.since(before))
                del batch
        except UserError as error:
            yield _Item(None, error, worker, self.stream.statistics.since(before))


def _keep_quiet_about_readers() -> None:
    """In a loader process: the thread that hands over batches prints a traceback when the reader is gone. The reader's
    own message says why."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            before(kind, error, trace)

    sys.excepthook = hook


# Loader processes that were killed, by their ids, as the handler of SIGCHLD has noted them.
_killed: dict[int, LoaderError] = {}


def _next(iterator: Iterator[_Item]) -> _Item | None:
    """The next item, None at the end; the death of a worker, now or since the last item, as our error."""
    item, error = None, _noted(iterator)
    if error is None:
        try:
            item = next(iterator, None)
        except RuntimeError as caught:
            death = _death(caught)
            raise (_noted(iterator) or death) if death else caught from None
        if item is not None and isinstance(item.batch, LoaderError):
            error = _noted(iterator) or item.batch
    if error is not None:
        raise error
    return item


def _noted(iterator: Iterator[_Item]) -> LoaderError | None:
    """What was noted of the processes that work for this iterator; it is noted no longer."""
    found = [_killed.pop(worker.pid, None) for worker in getattr(iterator, "_workers", ())]
    return next((error for error in found if error is not None), None)


def _death(error: RuntimeError) -> LoaderError | None:
    """Our error for torch's "DataLoader worker (pid 1) is killed by signal: Killed."; None if it is another."""
    if isinstance(error.__cause__, LoaderError):
        return error.__cause__
    if not re.match(r"DataLoader worker \(pid", str(error)):
        return None
    return LoaderError(f"{' '.join(str(error).split()).rstrip('.')}: {handover.WHY_KILLED}")


def _note_deaths() -> None:
    """torch raises a worker's death from a handler of SIGCHLD, wherever the main thread is. In a finalizer it would be
    lost, and out of a library's work it may come as anything: so it is noted, for the loop that asks for a batch."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    theirs = signal.getsignal(signal.SIGCHLD)
    if callable(theirs) and not isinstance(theirs, _DeathHandler):
        signal.signal(signal.SIGCHLD, _DeathHandler(theirs))


class _DeathHandler:
    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.theirs(number, frame)
        except RuntimeError as error:
            death, who = _death(error), re.search(r"\(pid (\d+)\)", str(error))
            if death is None or who is None:
                raise
            _killed[int(who[1])] = death
