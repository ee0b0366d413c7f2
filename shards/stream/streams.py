"""Order + reader + (rank, world, worker) as a torch `IterableDataset`.

    from shards.format.dataset import open_dataset
    from shards.stream.loader import loader
    from shards.stream.streams import ShardStream

    stream = ShardStream(open_dataset("s3://bucket/prefix"), "train", batch_size=8, rank=rank, world=world)
    for samples in loader(stream, workers=4):  # endless; each a list of Sample, unless `parse` makes something else
        ...

The stream shares itself out over ranks and workers: never hand its loader to `accelerator.prepare`, which would split
it a second time. A loader that was is refused when it is first read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from shards.common.argument_checks import real, whole
from shards.common.errors import DatasetError
from shards.common.text import counted
from shards.format.dataset import Dataset
from shards.format.index import Index, row_numbers
from shards.format.sample import Sample
from shards.order.epoch_order import Order, OrderSettings, evaluation_batches, positions
from shards.order.identity import check_identity
from shards.order.mixture import Mix, MixedOrder
from shards.storage.location import Location
from shards.stream.reader import READ_AHEAD, STALL_S, SampleReader, SampleStatistics
from shards.stream.sample_decoders import Parse, parse_sample

if TYPE_CHECKING:
    from shards.stream.sample_cache import SampleCache

P = TypeVar("P")  # a sample, as `parse` makes it
T = TypeVar("T")  # a batch: of `collate`, or list[P]
Collate = Callable[[list[Any], int], T]  # of what `parse` gives, and the visit


class _Options(TypedDict, total=False):
    """What both streams take and what says nothing of the type of a batch; for the type checker alone."""

    rank: int
    world: int
    read_ahead: int
    cache: SampleCache | None
    stall_s: float


class _ShardOptions(_Options, total=False):
    seed: int
    start: int
    identity: Mapping[str, Any] | None
    lanes: int
    window: int
    group_by_aspect: bool
    repeat_threshold: float


class _EvalOptions(_Options, total=False):
    rows: NDArray[np.int64] | None


class Stream(IterableDataset[T]):
    """What both streams share: who they are for, and whom they refuse."""

    batch_size: int
    rank: int
    world: int
    parse: Parse
    collate: Collate[T] | None
    statistics: SampleStatistics  # of this process; `Loader.statistics` is of all loader processes

    def set_epoch(self, epoch: int) -> None:
        """Refuses. A stream needs no telling; `accelerate` calls this when it reads a loader that it has prepared.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(
            "set_epoch was called on a stream, as by a loader that went through accelerator.prepare: that would share "
            "out a second time, over ranks, what the stream has shared out already; prepare the model and the "
            "optimizer only, and read the loader as it is"
        )

    def _take(self, batch_size: int, rank: int, world: int, parse: Parse, collate: Collate[T] | None) -> None:
        self.batch_size = whole("batch_size", batch_size)
        self.rank, self.world = whole("rank", rank), whole("world", world)
        self.parse, self.collate = parse, collate
        if not callable(parse) or not (collate is None or callable(collate)):
            raise DatasetError(f"parse is {parse!r}, collate is {collate!r}: give functions, or leave them out")
        if not 0 <= self.rank < self.world:
            raise DatasetError(f"rank {self.rank} of {self.world}: a rank lies between 0 and world - 1")
        if self.batch_size < 1:
            raise DatasetError(f"batch_size is {self.batch_size}: it must be at least 1")

    def _read(self, reader: SampleReader, rows: Iterable[int | None]) -> Iterator[Any]:
        """The samples of the given rows, in that order."""
        for row, data in reader.read(rows, who=_who(self.rank)):
            yield self.parse(data, reader.index, row, str(reader.root))

    def _collated(self, samples: list[Any], visit: int) -> T:
        return samples if self.collate is None else self.collate(samples, visit)  # type: ignore[return-value]


class ShardStream(Stream[T]):
    """The endless training batches of one rank.

    Global batch G goes to rank G mod world (counted from `start`). With the same seed, batch size, lanes and window,
    any number of ranks and workers reads the same global batches, and `start` continues a run where it stopped.

    Args:
        dataset: the dataset, whole or a subset (`Dataset.select`), or a `Mix` of several.
        split: "train", "val" or "test".
        batch_size: samples a batch of one rank.
        seed, lanes, window, group_by_aspect, repeat_threshold: see `shards.order.epoch_order`.
        rank, world: of this process.
        start: the position G to start at: batches that all ranks together have consumed.
        identity: what `order.identity()` was when the position was saved: with another order it is refused.
        read_ahead: bytes that each loader process may hold ahead of need; at least twice the largest sample of each
            dataset.
        cache: keeps samples on a disk of this machine for the next epoch; see `shards.stream.sample_cache`.
        stall_s: a loader process that waits so many seconds for storage says what for, in the log.
        parse: makes a sample of the bytes in the shard, in the loader process; default a `Sample`. For the bytes
            themselves: `shards.stream.sample_decoders.webdataset_sample`.
        collate: makes a batch of a list of samples and the number of their visit, in the loader process. The number is
            the epoch's; where a sample may come twice in an epoch (repeats, mixes) it is the position. So a seed that
            is folded from it and the sample's key is another in every batch. Default: the list.

    Raises:
        DatasetError: no such split, too few samples for a batch on every rank, a setting out of its range, or another
            identity (the first key that differs is named with both values).
    """

    @overload
    def __init__(
        self: ShardStream[list[Sample]],
        dataset: Dataset | Mix,
        split: str,
        *,
        batch_size: int,
        collate: None = None,
        **options: Unpack[_ShardOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: ShardStream[list[P]],
        dataset: Dataset | Mix,
        split: str,
        *,
        batch_size: int,
        parse: Callable[[memoryview, Index, int, str], P],
        collate: None = None,
        **options: Unpack[_ShardOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        dataset: Dataset | Mix,
        split: str,
        *,
        batch_size: int,
        parse: Parse = ...,
        collate: Collate[T],
        **options: Unpack[_ShardOptions],
    ) -> None: ...

    def __init__(
        self,
        dataset: Dataset | Mix,
        split: str,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        identity: Mapping[str, Any] | None = None,
        lanes: int = 8,
        window: int = 128,
        group_by_aspect: bool = False,
        repeat_threshold: float = 0.0,
        read_ahead: int = READ_AHEAD,
        cache: SampleCache | None = None,
        stall_s: float = STALL_S,
        parse: Parse = parse_sample,
        collate: Collate[T] | None = None,
    ) -> None:
        _check_dataset(dataset, mixes=True)
        self._take(batch_size, rank, world, parse, collate)
        self.start = whole("start", start)
        if self.start < 0:
            raise DatasetError(f"start is {start}: a position is the number of batches consumed so far")
        settings = OrderSettings(batch_size, seed, lanes, window, group_by_aspect, repeat_threshold=repeat_threshold)
        datasets = dataset.datasets if isinstance(dataset, Mix) else (dataset,)
        indexes = dataset.indexes(split) if isinstance(dataset, Mix) else (dataset.index(split),)
        samples = sum(map(len, indexes))
        if samples < self.batch_size * self.world:
            raise DatasetError(
                f"{' + '.join(str(one.root) for one in datasets)}: split {split!r} has "
                f"{counted(samples, 'sample')}, fewer than one batch of {self.batch_size} on each of "
                f"{counted(self.world, 'rank')}: lower the batch size or build more samples"
            )
        self.order: Order | MixedOrder
        if isinstance(dataset, Mix):
            self.order = MixedOrder(indexes, dataset.weights, settings)
        else:
            self.order = Order(indexes[0], settings)
        if identity is not None:
            check_identity(identity, self.order.identity())
        weights = dataset.weights if isinstance(dataset, Mix) else (1,)
        _check_reading(read_ahead, cache, stall_s)
        budgets = share_read_ahead(read_ahead, datasets, indexes, weights)
        self.statistics = SampleStatistics()
        self._readers = [
            SampleReader(one.root, index, budget, cache, stall_s, self.statistics)
            for one, index, budget in zip(datasets, self.order.indexes, budgets)
        ]

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of one epoch."""
        return self.order.batches_per_epoch

    def __iter__(self) -> Iterator[T]:
        worker, workers = _worker()

        def mine() -> Iterator[int]:
            return positions(self.start, rank=self.rank, world=self.world, worker=worker, workers=workers)

        def rows(number: int) -> Iterator[int | None]:
            for position in mine():
                found = self.order.rows(position, number)
                yield from found if len(found) else (None,)

        # Readers look ahead, so each goes through the row of positions by itself.
        samples = [self._read(reader, rows(number)) for number, reader in enumerate(self._readers)]
        for position in mine():
            sizes = self.order.sizes(position)
            batch = [next(source) for source, size in zip(samples, sizes) for _ in range(size)]
            yield self._collated(batch, self.order.visit(position))


class EvalStream(Stream[T]):
    """A split's samples, each exactly once over all ranks and workers; ranks may differ by one batch.

    Args and errors are those of `ShardStream`; the last batch may be smaller. `rows`: which samples of the split's
    index, ascending; None for all.
    """

    @overload
    def __init__(
        self: EvalStream[list[Sample]],
        dataset: Dataset,
        split: str,
        *,
        batch_size: int,
        collate: None = None,
        **options: Unpack[_EvalOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: EvalStream[list[P]],
        dataset: Dataset,
        split: str,
        *,
        batch_size: int,
        parse: Callable[[memoryview, Index, int, str], P],
        collate: None = None,
        **options: Unpack[_EvalOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        batch_size: int,
        parse: Parse = ...,
        collate: Collate[T],
        **options: Unpack[_EvalOptions],
    ) -> None: ...

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        read_ahead: int = READ_AHEAD,
        cache: SampleCache | None = None,
        stall_s: float = STALL_S,
        parse: Parse = parse_sample,
        collate: Collate[T] | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        _check_dataset(dataset, mixes=False)
        self._take(batch_size, rank, world, parse, collate)
        index = dataset.index(split)
        self._rows = None if rows is None else row_numbers(rows, len(index))
        self.samples = len(index) if self._rows is None else len(self._rows)
        _check_reading(read_ahead, cache, stall_s)
        [own] = share_read_ahead(read_ahead, (dataset,), (index,), (1,))
        self.statistics = SampleStatistics()
        self._reader = SampleReader(dataset.root, index.without_labels(), own, cache, stall_s, self.statistics)

    def __iter__(self) -> Iterator[T]:
        worker, workers = _worker()
        share = {"rank": self.rank, "world": self.world, "worker": worker, "workers": workers}
        batches = list(evaluation_batches(self.samples, self.batch_size, **share))
        if self._rows is not None:
            batches = [self._rows[batch] for batch in batches]
        samples = self._read(self._reader, chain.from_iterable(batches))
        for batch in batches:
            yield self._collated([next(samples) for _ in batch], 0)


def _check_dataset(given: Any, *, mixes: bool) -> None:
    """Refuses what is no opened dataset (or mix, where one will do), and says how it becomes one."""
    if isinstance(given, Dataset) or (mixes and isinstance(given, Mix)):
        return
    if isinstance(given, Mix):
        told = "a Mix: evaluate each of its datasets by itself"
    elif isinstance(given, str | os.PathLike | Location):
        told = f"{str(given)!r}: open it first, open_dataset({str(given)!r})"
    elif isinstance(given, list | tuple):
        told = f"a {type(given).__name__}: " + ("give Mix(datasets, weights)" if mixes else "evaluate one at a time")
    else:
        told = f"a {type(given).__name__}: give what open_dataset returns"
    raise DatasetError(f"the dataset of a stream is {told}")


def _check_reading(read_ahead: Any, cache: Any, stall_s: Any) -> None:
    real("read_ahead", read_ahead)
    real("stall_s", stall_s)
    if isinstance(cache, str | os.PathLike):
        raise DatasetError(f"cache is {str(cache)!r}: give SampleCache({str(cache)!r}, limit in bytes)")


def share_read_ahead(
    total: int, datasets: Sequence[Dataset], indexes: Sequence[Index], weights: Sequence[float]
) -> list[int]:
    """The read-ahead of each dataset of a loader process: two of its largest samples, and of the rest by weight.

    Two, because one may be waiting in memory while another is needed.

    Raises:
        DatasetError: it is not enough for that.
    """
    least = [2 * int(index.nbytes.max(initial=0)) for index in indexes]
    if total < max(1, sum(least)):
        where = " + ".join(str(dataset.root) for dataset in datasets)
        raise DatasetError(
            f"{where}: read_ahead is {total} bytes, twice the largest sample is {sum(least)}: give at least as many"
        )
    return [own + int((total - sum(least)) * weight / sum(weights)) for own, weight in zip(least, weights)]


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _who(rank: int) -> str:
    info = get_worker_info()
    return f"rank {rank}" if info is None else f"rank {rank}, loader worker {info.id}"
