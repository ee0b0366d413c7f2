"""Loaders that went through `accelerator.prepare`, with the real accelerate, are refused with the reason."""

import itertools
from pathlib import Path

import pytest
from accelerate import Accelerator
from torch.utils.data import DataLoader

from shards.common.errors import DatasetError
from shards.format.dataset import open_dataset
from shards.stream.loader import loader
from shards.stream.streams import EvalStream, ShardStream


def check_prepared_loaders(accelerator: Accelerator, root: Path) -> None:
    """Try each kind of loader after `prepare`."""
    share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    dataset = open_dataset(str(root))
    streams = (
        ShardStream(dataset, "train", batch_size=2, **share, collate=lambda batch, visit: len(batch)),
        EvalStream(dataset, "train", batch_size=2, **share, collate=lambda batch, visit: len(batch)),
    )
    before = accelerator.dataloader_config.dispatch_batches
    for stream, workers, dispatch in itertools.product(streams, (0, 1), (None, False)):
        accelerator.dataloader_config.dispatch_batches = dispatch
        own = DataLoader(stream, batch_size=None, num_workers=workers)
        for inner in (own, loader(stream, workers=workers).inner):
            with pytest.raises(DatasetError, match=r"accelerator\.prepare.*prepare the model and the optimizer only"):
                next(iter(accelerator.prepare(inner)))
    accelerator.dataloader_config.dispatch_batches = before

    # `loader` returns no DataLoader: prepare returns it unchanged, and it works.
    whole = loader(ShardStream(dataset, "train", batch_size=2, **share))
    assert accelerator.prepare(whole) is whole
    expected = ShardStream(dataset, "train", batch_size=2, **share)
    assert all(batch == wanted for batch, wanted in itertools.islice(zip(whole, expected), 3))


def test_a_prepared_loader_is_refused(dataset: Path) -> None:
    """On one rank; `two_ranks.py` does the same on two."""
    check_prepared_loaders(Accelerator(cpu=True), dataset)
