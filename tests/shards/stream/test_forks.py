"""Loader processes that are forked, before and after this process has read from storage itself."""

import os
import subprocess
import sys

from shards.format.dataset import Dataset
from tests.support import REPOSITORY

CODE = """
import logging, os, sys
from itertools import islice
from shards.format.dataset import open_dataset
from shards.storage import object_store
from shards.stream.loader import loader
from shards.stream.streams import ShardStream

def parse(sample):
    return sample["__key__"], object_store._user == os.getpid()

def read(root, workers):
    stream = ShardStream(open_dataset(root), "train", batch_size=4, seed=3, parse=parse)
    return [sample for batch in islice(loader(stream, workers=workers, start_method="fork"), 12) for sample in batch]

logging.basicConfig(format="%(message)s")
keys = [key for key, _ in read(sys.argv[1], 0)]
for workers, by_obstore in ((2, True), (0, True), (2, False)):  # of the third loop, the parent has read before
    assert read(sys.argv[2], workers) == [(key, by_obstore) for key in keys], workers
"""


def test_a_fork_after_a_read_does_not_hang_and_is_logged(local: Dataset, remote: Dataset) -> None:
    command = [sys.executable, "-c", CODE, str(local.root), str(remote.root)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line = "this process was forked from one that had read from storage itself, so it reads more slowly, through fsspec"
    assert [text.startswith(line) for text in done.stderr.splitlines()] == [True, True]  # one per process
