import itertools
from collections.abc import Iterable
from typing import Any

from shards.format.dataset import Dataset
from shards.format.sample import Sample
from shards.order.mixture import Mix
from shards.stream.loader import loader
from shards.stream.streams import ShardStream

SAMPLES, BATCH = 60, 4
EPOCH = SAMPLES // BATCH  # batches


def small_stream(dataset: Dataset | Mix, **options: Any) -> ShardStream[list[Sample]]:
    """With little read-ahead: there are many ranges, and most are still to be read when a test changes something."""
    settings = {"batch_size": BATCH, "seed": 3, "lanes": 3, "window": 8, "read_ahead": 30_000}
    return ShardStream(dataset, "train", **(settings | options))


def take(stream: Any, count: int, workers: int = 0) -> list[Any]:
    return list(itertools.islice(loader(stream, workers=workers), count))


def keys(samples: Iterable[Sample]) -> tuple[str, ...]:
    return tuple(sample.image_id for sample in samples)


def take_keys(dataset: Dataset | Mix, count: int, workers: int = 0, **options: Any) -> list[tuple[str, ...]]:
    return [keys(batch) for batch in take(small_stream(dataset, **options), count, workers)]
