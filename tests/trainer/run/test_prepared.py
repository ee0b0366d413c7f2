"""Loaders that went through `accelerator.prepare`, with the real accelerate, are refused with the reason."""

import itertools
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import DataLoader

from shards.common.errors import DatasetError
from shards.format.dataset import open_dataset
from shards.stream.loader import loader
from shards.stream.streams import EvalStream, ShardStream


def outcomes_of_prepared_loaders(accelerator: Accelerator, root: Path) -> dict[str, str]:
    """Try each kind of loader after `prepare`; returns the error of its first batch, empty if it could be read."""
    share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    dataset = open_dataset(str(root))
    streams = {
        "train": ShardStream(dataset, "train", batch_size=2, **share, collate=lambda batch, visit: len(batch)),
        "eval": EvalStream(dataset, "train", batch_size=2, **share, collate=lambda batch, visit: len(batch)),
    }
    outcomes = {}
    before = accelerator.dataloader_config.dispatch_batches
    for (name, stream), workers, dispatch in itertools.product(streams.items(), (0, 1), (None, False)):
        accelerator.dataloader_config.dispatch_batches = dispatch
        own = DataLoader(stream, batch_size=None, num_workers=workers)
        for kind, inner in (("own", own), ("inner", loader(stream, workers=workers).inner)):
            try:
                next(iter(accelerator.prepare(inner)))
                outcome = ""
            except DatasetError as error:
                outcome = str(error)
            outcomes[f"{name}, {workers} workers, dispatch {dispatch}, {kind}"] = outcome
    accelerator.dataloader_config.dispatch_batches = before

    # `loader` returns no DataLoader: prepare returns it unchanged, and it works.
    whole = loader(ShardStream(dataset, "train", batch_size=2, **share))
    assert accelerator.prepare(whole) is whole
    expected = ShardStream(dataset, "train", batch_size=2, **share)
    assert all(batch == wanted for batch, wanted in itertools.islice(zip(whole, expected), 3))
    return outcomes


def test_a_prepared_loader_is_refused(dataset: Path) -> None:
    """On one rank; `test_two_ranks.py` has the same on two."""
    check_refused(outcomes_of_prepared_loaders(Accelerator(cpu=True), dataset))


def check_refused(outcomes: dict[str, str]) -> None:
    assert len(outcomes) == 16
    for outcome in outcomes.values():
        assert "accelerator.prepare" in outcome
        assert "prepare the model and the optimizer only" in outcome
