"""Streams of batches: an order, a reader, and the rank and worker of a process as a torch `IterableDataset`.

    from maskstream import ShardStream, loader, open_dataset

    stream = ShardStream(open_dataset("s3://bucket/prefix"), "train", batch_size=8, rank=rank, world=world)
    for samples in loader(stream, workers=4):  # endless; each batch is a list of Sample, unless `parse` is given
        ...

A stream shards itself over ranks and workers: never pass its loader to `accelerator.prepare`, which would shard it a
second time. A loader that was prepared is refused when it is first read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Required, TypedDict, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from shards.common.argument_checks import real, whole
from shards.common.errors import DatasetError
from shards.common.text import counted, shown
from shards.format.dataset import Dataset
from shards.format.index import row_numbers
from shards.order.epoch_order import EvaluationOrder, Order, OrderSettings, check_identity, positions
from shards.order.mixture import Mix, MixedOrder
from shards.storage.location import Location
from shards.stream.pipeline import AnyOrder, BatchReader, Collate, Stage
from shards.stream.reader import READ_AHEAD, STALL_S, SampleReader, SampleStatistics
from shards.stream.replacements import BadSample
from shards.stream.sample_decoders import Parse, parse_sample

if TYPE_CHECKING:
    import typing_extensions

    from shards.format.sample import Sample
    from shards.stream.sample_cache import SampleCache

    P = typing_extensions.TypeVar("P", default=Sample)
    _To = Callable[[dict[str, Any]], P]  # a `parse` that makes P

Data = Dataset | Mix
T = TypeVar("T")  # a batch: what `collate` returns, or list[P]


class _Options(TypedDict, total=False):
    """Arguments of both streams that do not affect the type of a batch; for type checkers."""

    batch_size: Required[int]
    rank: int
    world: int
    read_ahead: int
    cache: SampleCache | None
    stall_s: float
    stages: Sequence[Stage]


class _ShardOptions(_Options, total=False):
    seed: int
    start: int
    identity: Mapping[str, Any] | None
    lanes: int
    window: int
    group_by_aspect: bool
    repeat_threshold: float
    skip_bad: int


class _EvalOptions(_Options, total=False):
    rows: NDArray[np.int64] | None


class Stream(IterableDataset[T]):
    """What `ShardStream` and `EvalStream` have in common."""

    order: AnyOrder
    statistics: SampleStatistics  # of this process; `Loader.statistics` is of all loader processes
    skip_bad: int = 0
    bad_samples: list[BadSample]  # that this process has replaced; `Loader.bad_samples` is of all loader processes
    start: int = 0
    _stop: int | None = None  # the end of all positions

    def __init__(
        self,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        read_ahead: int = READ_AHEAD,
        cache: SampleCache | None = None,
        stall_s: float = STALL_S,
        stages: Sequence[Stage] = (),
        parse: Parse = parse_sample,
        collate: Collate[T] | None = None,
    ) -> None:
        real("read_ahead", read_ahead)
        real("stall_s", stall_s)
        if isinstance(cache, str | os.PathLike):
            raise DatasetError(f"cache is {str(cache)!r}: give SampleCache({str(cache)!r}, limit in bytes)")
        self.read_ahead, self.cache, self.stall_s = read_ahead, cache, stall_s
        self.batch_size = whole("batch_size", batch_size, 1)
        self.rank, self.world = whole("rank", rank), whole("world", world)
        self.stages, self.parse, self.collate = stages, parse, collate
        self.bad_samples = []
        if not callable(parse) or not (collate is None or callable(collate)):
            raise DatasetError(f"parse is {parse!r}, collate is {collate!r}: give functions, or leave them out")
        if not isinstance(stages, Sequence) or not all(map(callable, stages)):
            raise DatasetError(f"stages is {shown(stages)}: give a list of webdataset stages, such as [wds.map(f)]")
        if not 0 <= self.rank < self.world:
            raise DatasetError(f"rank {self.rank} of {self.world}: a rank is between 0 and world - 1")

    def __iter__(self) -> Iterator[T]:
        # `iter` of a pipeline, which can repeat it, would keep each batch in memory until the next one is made.
        return iter(self.pipeline().iterator1())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._source}, batch_size={self.batch_size}, rank {self.rank} of {self.world})"

    def pipeline(self) -> Any:
        """Return the `webdataset.DataPipeline` that yields the batches of this process; it can be read once."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        who = f"rank {self.rank}" if info is None else f"rank {self.rank}, loader worker {info.id}"
        own = partial(
            positions, self.start, rank=self.rank, world=self.world, worker=worker, workers=workers, stop=self._stop
        )
        collate: Collate[Any] = self.collate or (lambda samples, visit: samples)
        skipping = (self.skip_bad, self.bad_samples)
        return BatchReader(self.order, own, self._readers, collate, who, self.stages, self.parse, *skipping).pipeline()

    def _open(self, datasets: Sequence[Dataset], split: str, weights: Sequence[float]) -> None:
        """Make a reader per dataset."""
        self._source = f"{_roots(datasets)}, {split!r}"
        self.statistics = SampleStatistics()
        # Of each, two of its largest samples, one waiting while another is needed, and a share of the rest by weight.
        least = [2 * int(index.nbytes.max(initial=0)) for index in self.order.indexes]
        rest = self.read_ahead - sum(least)
        if rest < 0 or self.read_ahead < 1:
            raise DatasetError(
                f"{_roots(datasets)}: read_ahead is {self.read_ahead} bytes, twice the largest sample is {sum(least)}: "
                "give at least as many"
            )
        shares = [own + int(rest * weight / sum(weights)) for own, weight in zip(least, weights)]
        self._readers = [
            SampleReader(dataset.root, index, share, self.cache, self.stall_s, self.statistics)
            for dataset, index, share in zip(datasets, self.order.indexes, shares)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Raise a DatasetError: `accelerate` calls this when it reads a loader that it has prepared."""
        raise DatasetError(
            "set_epoch was called on a stream, as by a loader that went through accelerator.prepare: prepare would "
            "shard over ranks what the stream has sharded already; prepare the model and the optimizer only, and read "
            "the loader as it is"
        )


class ShardStream(Stream[T]):
    """The endless training batches of one rank.

    Global batch G goes to rank G mod world (counted from `start`). With the same seed, batch size, lanes and window,
    any number of ranks and workers reads the same global batches, and `start` resumes a run where it stopped.

    Args:
        dataset: the dataset, whole or a subset (`Dataset.select`), or a `Mix` of several.
        split: "train", "val" or "test".
        batch_size: samples per batch of one rank.
        seed, lanes, window, group_by_aspect, repeat_threshold: see `shards.order.epoch_order.OrderSettings`.
        rank, world: of this process, and the number of ranks; by default 0 of 1.
        start: the position G to start at: the number of batches that all ranks together have consumed.
        skip_bad: number of different damaged samples that each loader process replaces, by default 0; one more is an
            error (`shards.stream.replacements`). They are in `Loader.bad_samples`.
        identity: `order.identity()` when the position was saved; another order is refused.
        read_ahead: bytes that each loader process may hold ahead of need, by default 128 MiB; at least twice the
            largest sample of each dataset.
        cache: keeps samples on a local disk for the next epoch; see `shards.stream.sample_cache`.
        stall_s: seconds, by default 30, after which a loader process that waits for storage logs what it waits for.
        stages: webdataset stages, functions from an iterator of samples to an iterator of samples. They receive
            webdataset's dicts (`__key__`, `__url__`, `jpg` or `png`, `json`) and yield one sample for each.
        parse: makes a sample of webdataset's dict, in the loader process; default: a `Sample`. For the dict itself:
            `shards.stream.sample_decoders.webdataset_sample`.
        collate: makes a batch of a list of samples and the number of their visit, in the loader process; default: the
            list. No two batches with the same sample have the same number: the epoch or, with repeats and in mixes,
            the position.

    Raises:
        DatasetError: no such split, too few samples for a batch on every rank, a wrong setting, or another identity.
    """

    @overload
    def __init__(
        self: ShardStream[list[P]], dataset: Data, split: str, *, parse: _To[P] = ..., **options: Unpack[_ShardOptions]
    ) -> None: ...

    @overload
    def __init__(
        self, dataset: Data, split: str, *, collate: Collate[T], parse: Parse = ..., **options: Unpack[_ShardOptions]
    ) -> None: ...

    def __init__(
        self,
        dataset: Data,
        split: str,
        *,
        seed: int = 0,
        start: int = 0,
        identity: Mapping[str, Any] | None = None,
        lanes: int = 8,
        window: int = 128,
        group_by_aspect: bool = False,
        repeat_threshold: float = 0.0,
        skip_bad: int = 0,
        **options: Any,
    ) -> None:
        _check_dataset(dataset, mixes=True)
        super().__init__(**options)
        self.start, self.skip_bad = whole("start", start), whole("skip_bad", skip_bad, 0)
        if self.start < 0:
            raise DatasetError(f"start is {start}: a position is the number of batches consumed so far")
        size = self.batch_size
        settings = OrderSettings(size, seed, lanes, window, group_by_aspect, repeat_threshold=repeat_threshold)
        if isinstance(dataset, Mix):
            datasets, weights, indexes = dataset.datasets, dataset.weights, dataset.indexes(split)
        else:
            datasets, weights, indexes = (dataset,), (1,), (dataset.index(split),)
        samples = sum(map(len, indexes))
        if samples < size * self.world:
            raise DatasetError(
                f"{_roots(datasets)}: split {split!r} has {counted(samples, 'sample')}, fewer than one batch of {size} "
                f"on each of {counted(self.world, 'rank')}: lower the batch size or build more samples"
            )
        self.order: Order | MixedOrder
        self.order = MixedOrder(indexes, weights, settings) if isinstance(dataset, Mix) else Order(indexes[0], settings)
        if identity is not None:
            check_identity(identity, self.order.identity())
        self._open(datasets, split, weights)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of one epoch."""
        return self.order.batches_per_epoch


class EvalStream(Stream[T]):
    """The samples of a split, each exactly once over all ranks and workers, in the order of the index.

    Ranks may differ by one batch, and the last batch may be smaller. `len()` is the number of batches of this rank.

    Args:
        dataset: the dataset, whole or a subset; not a `Mix`.
        rows: rows of the split's index to read, int64 [n], ascending; None for all.

    The other arguments, and the errors, are those of `ShardStream`; the visit that `collate` gets is 0.
    """

    @overload
    def __init__(
        self: EvalStream[list[P]], dataset: Dataset, split: str, *, parse: _To[P] = ..., **options: Unpack[_EvalOptions]
    ) -> None: ...

    @overload
    def __init__(
        self, dataset: Dataset, split: str, *, collate: Collate[T], parse: Parse = ..., **options: Unpack[_EvalOptions]
    ) -> None: ...

    def __init__(self, dataset: Dataset, split: str, *, rows: NDArray[np.int64] | None = None, **options: Any) -> None:
        _check_dataset(dataset, mixes=False)
        super().__init__(**options)
        index = dataset.index(split)
        chosen = None if rows is None else row_numbers(rows, len(index))
        self.order: EvaluationOrder = EvaluationOrder(index, self.batch_size, chosen)
        self._stop = len(self.order)
        self._open((dataset,), split, (1,))

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(range(self.rank, len(self.order), self.world))


def _roots(datasets: Sequence[Dataset]) -> str:
    return " + ".join(str(dataset.root) for dataset in datasets)


def _check_dataset(given: Any, *, mixes: bool) -> None:
    if isinstance(given, Dataset) or (mixes and isinstance(given, Mix)):
        return
    if isinstance(given, Mix):
        problem = "a Mix: evaluate each of its datasets by itself"
    elif isinstance(given, str | os.PathLike | Location):
        problem = f"{str(given)!r}: open it first, open_dataset({str(given)!r})"
    elif isinstance(given, list | tuple):
        problem = f"a {type(given).__name__}: " + ("give Mix(datasets, weights)" if mixes else "evaluate one at a time")
    else:
        problem = f"a {type(given).__name__}: give what open_dataset returns"
    raise DatasetError(f"the dataset of a stream is {problem}")
