"""The order on real processes: one per rank, each with torch's loader processes."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import pytest

from shards.format.dataset import Dataset
from shards.stream.streams import ShardStream
from tests.shards.stream.support import keys, take
from tests.support import sample, write_dataset

SAMPLES, SIZE = 61, 4
EPOCH = SAMPLES // SIZE


class Reading(NamedTuple):
    """What each rank reads: `steps` batches from position `start`."""

    workers: int
    start: int
    steps: int


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    samples = {"train": [sample(n) for n in range(SAMPLES)]}
    return write_dataset(tmp_path_factory.mktemp("data"), samples, per_shard=9)


def stream(dataset: Dataset, rank: int = 0, world: int = 1, start: int = 0) -> ShardStream:
    options: dict[str, Any] = {"batch_size": SIZE, "seed": 9, "lanes": 3, "window": 10, "read_ahead": 40_000}
    return ShardStream(dataset, "train", rank=rank, world=world, start=start, **options)


@pytest.fixture(scope="module")
def uninterrupted(dataset: Dataset) -> list[tuple[str, ...]]:
    """The keys of two epochs of global batches, read by one process."""
    return [keys(batch) for batch in take(stream(dataset), 2 * EPOCH)]


def read_by_ranks(dataset: Dataset, world: int, readings: list[Reading]) -> list[list[tuple[str, ...]]]:
    """The global batches of each reading, read by `world` processes at the same time."""
    context = multiprocessing.get_context("fork")  # importing torch would take seconds per process
    pipes, ranks = [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        ranks.append(context.Process(target=be_a_rank, args=(sender, dataset, rank, world, readings)))
        ranks[-1].start()
        sender.close()
        pipes.append(receiver)
    answers = [pipe.recv() for pipe in pipes]
    for process in ranks:
        process.join()
    return [
        [answers[rank][number][step] for step in range(reading.steps) for rank in range(world)]
        for number, reading in enumerate(readings)
    ]


def be_a_rank(answer: Connection, dataset: Dataset, rank: int, world: int, readings: list[Reading]) -> None:
    read = []
    for workers, start, steps in readings:
        batches = take(stream(dataset, rank, world, start), steps, workers)
        read.append([keys(batch) for batch in batches])
    answer.send(read)


def test_an_epoch_visits_every_sample_once_except_for_less_than_a_batch(uninterrupted: list[tuple[str, ...]]) -> None:
    for epoch in range(2):
        visited = [key for batch in uninterrupted[epoch * EPOCH : (epoch + 1) * EPOCH] for key in batch]
        assert len(set(visited)) == len(visited) == EPOCH * SIZE > SAMPLES - SIZE


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_ranks_and_workers_read_the_same_global_batches_from_any_position(
    dataset: Dataset, uninterrupted: list[tuple[str, ...]], world: int
) -> None:
    """Any run can therefore be resumed at its position by any other."""
    across_an_epoch = -(-(EPOCH + 1) // world)
    readings = [Reading(0, 7, 3), Reading(3, 0, across_an_epoch), Reading(2, 11, across_an_epoch)]
    for (_, start, steps), batches in zip(readings, read_by_ranks(dataset, world, readings), strict=True):
        assert batches == uninterrupted[start : start + world * steps]
