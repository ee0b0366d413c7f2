"""Order + reader + (rank, world, worker) as a torch `IterableDataset`.

    from shards.dataset import open_dataset
    from shards.loader import loader
    from shards.stream import ShardStream

    stream = ShardStream(open_dataset("s3://bucket/prefix"), "train", batch_size=8, rank=rank, world=world)
    for samples in loader(stream, workers=4):  # endless; each a list of Sample
        ...

The stream shares itself out over ranks and workers: never hand its loader to `accelerator.prepare`, which would split
it a second time.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from shards.dataset import Dataset, Index
from shards.errors import DatasetError, SampleError
from shards.order import Order, OrderSettings, evaluation_batches, positions
from shards.reader import READ_AHEAD, SampleReader
from shards.sample import Sample

T = TypeVar("T")
Collate = Callable[[Sequence[Sample], int], T]


class ShardStream(IterableDataset, Generic[T]):
    """The endless training batches of one rank.

    Global batch G goes to rank G mod world (counted from `start`). With the same seed, batch size, lanes and window,
    any number of ranks and workers reads the same global batches, and `start` continues a run where it stopped.

    Args:
        dataset: the dataset.
        split: "train", "val" or "test".
        batch_size: samples a batch of one rank.
        seed, lanes, window, group_by_aspect: see `shards.order`.
        rank, world: of this process.
        start: the position G to start at: batches that all ranks together have consumed.
        read_ahead: bytes that each loader process may hold ahead of need.
        collate: makes a batch of a list of samples and the epoch's number, in the loader process. Default: the list.

    Raises:
        DatasetError: no such split, or too few samples for a batch on every rank.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        lanes: int = 8,
        window: int = 256,
        group_by_aspect: bool = False,
        read_ahead: int = READ_AHEAD,
        collate: Collate[T] | None = None,
    ) -> None:
        _check_rank(rank, world)
        if start < 0:
            raise DatasetError(f"{dataset.root}: start is {start}: a position is the number of batches consumed so far")
        index = dataset.index(split)
        if len(index) < batch_size * world:
            raise DatasetError(
                f"{dataset.root}: split {split!r} has {len(index)} samples, fewer than one batch of {batch_size} "
                f"on each of {world} rank{'s' if world > 1 else ''}: lower the batch size or build more samples"
            )
        self.order = Order(index, OrderSettings(batch_size, seed, lanes, window, group_by_aspect))
        self.rank, self.world, self.start = rank, world, start
        self.collate = collate
        self._reader = SampleReader(dataset.root, index, read_ahead)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of one epoch."""
        return self.order.batches_per_epoch

    def __iter__(self) -> Iterator[T]:
        worker, workers = _worker()
        mine = positions(self.start, rank=self.rank, world=self.world, worker=worker, workers=workers)
        # One row of positions is read twice: by the reader, ahead, and here, to cut its samples into batches again.
        again = positions(self.start, rank=self.rank, world=self.world, worker=worker, workers=workers)
        samples = read_samples(self._reader, chain.from_iterable(map(self.order.batch, mine)))
        size = self.order.settings.batch_size
        for position in again:
            batch = [next(samples) for _ in range(size)]
            yield _collated(self.collate, batch, self.order.epoch_of(position))


class EvalStream(IterableDataset, Generic[T]):
    """A split's samples, each exactly once over all ranks and workers; ranks may differ by one batch.

    Args and errors are those of `ShardStream`; the last batch may be smaller.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        read_ahead: int = READ_AHEAD,
        collate: Collate[T] | None = None,
    ) -> None:
        _check_rank(rank, world)
        if batch_size < 1:
            raise DatasetError(f"{dataset.root}: batch_size is {batch_size}: it must be at least 1")
        index = dataset.index(split)
        self.samples = len(index)
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.collate = collate
        self._reader = SampleReader(dataset.root, index, read_ahead)

    def __iter__(self) -> Iterator[T]:
        worker, workers = _worker()
        share = {"rank": self.rank, "world": self.world, "worker": worker, "workers": workers}
        batches = list(evaluation_batches(self.samples, self.batch_size, **share))
        samples = read_samples(self._reader, chain.from_iterable(batches))
        for batch in batches:
            yield _collated(self.collate, [next(samples) for _ in batch], 0)


def read_samples(reader: SampleReader, rows: Iterable[int]) -> Iterator[Sample]:
    """The samples of the given rows, in that order.

    Raises:
        SampleError: a sample cannot be had or is not what the index says.
    """
    for row, data in reader.read(rows):
        yield parse_sample(data, reader.index, row, where=str(reader.root))


def parse_sample(data: bytes | memoryview, index: Index, row: int, *, where: str = "") -> Sample:
    """The sample in a range of a shard; the range is a readable tar, which webdataset's iterator parses.

    Raises:
        SampleError: the range holds another key than the index says, or members in another format.
    """
    image_id = index.image_id(row)
    place = f"{where}/{index.shard_paths[int(index.shard[row])]}"
    members: dict[str, bytes] = {}
    for member in tar_file_iterator(io.BytesIO(data)):
        key, extension = base_plus_ext(member["fname"])
        if key != image_id:
            raise SampleError(
                f"{place}: {member['fname']} lies where the index has {image_id}: build the dataset again"
            )
        members[extension] = member["data"]
    return Sample.from_members(image_id, members, where=place)


def webdataset_samples(samples: Sequence[Sample], epoch: int) -> list[dict[str, Any]]:
    """A `collate` that gives webdataset's dicts: a stream with it is the source of a `wds.DataPipeline`.

    wds.DataPipeline(ShardStream(..., collate=webdataset_samples), wds.filters.unlisted(), wds.decode("pil"), ...)
    """
    return [{"__key__": sample.image_id, "__epoch__": epoch, **sample.to_members()} for sample in samples]


def _collated(collate: Collate[T] | None, samples: list[Sample], epoch: int) -> T:
    return samples if collate is None else collate(samples, epoch)  # type: ignore[return-value]


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise DatasetError(f"rank {rank} of {world}: a rank lies between 0 and world - 1")
