"""The order on real processes: one process a rank, each with torch's loader processes."""

from __future__ import annotations

import itertools
import multiprocessing
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import pytest

from shards.format.dataset import open_dataset
from shards.stream.loader import loader
from shards.stream.streams import ShardStream
from tests.support import sample, write_dataset

SAMPLES, SIZE = 61, 4
OPTIONS = {"batch_size": SIZE, "seed": 9, "lanes": 3, "window": 10, "read_ahead": 40_000}
WORKERS = (0, 1, 2, 3)
EPOCH = SAMPLES // SIZE


class Reading(NamedTuple):
    """What each rank does: `steps` batches from the position `start` on, with so many loader processes."""

    workers: int
    start: int
    steps: int


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, {"train": [sample(n) for n in range(SAMPLES)]}, per_shard=9)
    return str(folder)


@pytest.fixture(scope="module")
def unbroken(root: str) -> list[list[str]]:
    """The keys of three epochs of global batches, read by one process."""
    stream = ShardStream(open_dataset(root), "train", **OPTIONS)
    return [[s.image_id for s in batch] for _, batch in zip(range(3 * EPOCH), stream)]


def read_by_ranks(root: str, world: int, plan: list[Reading]) -> list[list[list[str]]]:
    """Global batches of each reading, as `world` processes read them, which all run at once."""
    context = multiprocessing.get_context("fork")  # importing torch anew would take seconds a process
    pipes, ranks = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        ranks.append(context.Process(target=be_a_rank, args=(theirs, root, rank, world, plan)))
        ranks[-1].start()
        theirs.close()
        pipes.append(ours)
    answers = [pipe.recv() for pipe in pipes]
    for rank in ranks:
        rank.join()
    return [
        [answers[rank][number][step] for step in range(reading.steps) for rank in range(world)]
        for number, reading in enumerate(plan)
    ]


def be_a_rank(answer: Connection, root: str, rank: int, world: int, plan: list[Reading]) -> None:
    dataset, read = open_dataset(root), []
    for workers, start, steps in plan:
        stream = ShardStream(dataset, "train", rank=rank, world=world, start=start, **OPTIONS)
        batches = itertools.islice(loader(stream, workers=workers), steps)
        read.append([[sample.image_id for sample in batch] for batch in batches])
    answer.send(read)


def test_an_epoch_visits_every_sample_once_but_for_fewer_than_a_batch(unbroken: list[list[str]]) -> None:
    for epoch in range(3):
        keys = [key for batch in unbroken[epoch * EPOCH : (epoch + 1) * EPOCH] for key in batch]
        assert len(set(keys)) == len(keys) == EPOCH * SIZE > SAMPLES - SIZE


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_and_workers_give_the_same_global_batches_from_any_step(
    root: str, unbroken: list[list[str]], world: int
) -> None:
    """One run for each number of workers; the next one goes on where it stopped, at a step of no roundness."""
    rng = np.random.default_rng(world)
    plan: list[Reading] = []
    position = 0
    for workers in rng.permutation(WORKERS).tolist():
        plan.append(Reading(workers, position, int(rng.integers(1, 12 // world))))
        position += world * plan[-1].steps
    # Then from position 0 with every number of workers, over the end of an epoch.
    steps = -(-(EPOCH + 1) // world)
    plan += [Reading(workers, 0, steps) for workers in WORKERS]

    read = read_by_ranks(root, world, plan)
    for (_, start, steps), batches in zip(plan, read):
        assert batches == unbroken[start : start + world * steps]


def test_a_run_goes_on_with_other_numbers_of_ranks(root: str, unbroken: list[list[str]]) -> None:
    """Stopped at random steps; each time other ranks and workers take over at the one integer that is known."""
    position, batches = 0, []
    for world, workers, steps in ((3, 1, 4), (1, 3, 5), (2, 2, 3), (4, 0, 2)):
        batches += read_by_ranks(root, world, [Reading(workers, position, steps)])[0]
        position = len(batches)
    assert batches == unbroken[:position]
