"""The order on real processes: one per rank, each with torch's loader processes."""

import multiprocessing
from multiprocessing.connection import Connection

import pytest

from shards.format.dataset import Dataset
from tests.shards.stream.support import SAMPLES, take_keys

SIZE = 7
EPOCH = SAMPLES // SIZE  # 4 samples are left over


def be_a_rank(answer: Connection, dataset: Dataset, rank: int, world: int, readings: list[tuple]) -> None:
    options = {"batch_size": SIZE, "rank": rank, "world": world}
    answer.send([take_keys(dataset, steps, workers, start=start, **options) for workers, start, steps in readings])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_ranks_and_workers_read_the_same_global_batches_from_any_position(local: Dataset, world: int) -> None:
    """Any run can therefore be resumed at its position by any other."""
    across_an_epoch = -(-(EPOCH + 1) // world)
    readings = [(0, 7, 3), (3, 0, across_an_epoch), (2, 11, across_an_epoch)]  # workers, start, steps
    context = multiprocessing.get_context("fork")  # importing torch would take seconds per process
    pipes, ranks = [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        ranks.append(context.Process(target=be_a_rank, args=(sender, local, rank, world, readings)))
        ranks[-1].start()
        sender.close()
        pipes.append(receiver)
    answers = [pipe.recv() for pipe in pipes]
    for process in ranks:
        process.join()
    by_one_process = take_keys(local, 3 * EPOCH, batch_size=SIZE)
    for number, (_, start, steps) in enumerate(readings):
        batches = [answers[rank][number][step] for step in range(steps) for rank in range(world)]
        assert batches == by_one_process[start : start + world * steps]
