"""The types of batches in a user's own loop, which mypy checks (`make check`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

from shards.stream.loader import Loader, loader
from shards.stream.sample_decoders import webdataset_sample
from shards.stream.streams import EvalStream, ShardStream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shards.format.dataset import Dataset
    from shards.format.sample import Sample
    from shards.order.mixture import Mix
    from shards.stream.pipeline import Stage

    def tensors(samples: list[Sample], visit: int) -> Tensor:
        return torch.zeros(len(samples))

    def untyped(samples, visit):  # type: ignore[no-untyped-def]
        return {}

    def batches(dataset: Dataset, mix: Mix, stage: Stage) -> None:
        assert_type(ShardStream(dataset, "train", batch_size=4, seed=1), ShardStream[list[Sample]])
        assert_type(ShardStream(dataset, "train", batch_size=4, stages=[stage]), ShardStream[list[Sample]])
        assert_type(loader(ShardStream(mix, "train", batch_size=4), workers=2), Loader[list[Sample]])
        assert_type(next(iter(loader(EvalStream(dataset, "val", batch_size=4, rank=1, world=2)))), list[Sample])
        dicts = ShardStream(dataset, "train", batch_size=4, parse=webdataset_sample)
        assert_type(next(iter(dicts)), list[dict[str, Any]])
        assert_type(EvalStream(dataset, "val", batch_size=4, parse=webdataset_sample), EvalStream[list[dict[str, Any]]])
        assert_type(next(iter(loader(ShardStream(dataset, "train", batch_size=4, collate=tensors)))), Tensor)
        assert_type(EvalStream(dataset, "val", batch_size=4, collate=tensors), EvalStream[Tensor])
        assert_type(next(iter(ShardStream(dataset, "train", batch_size=4, collate=untyped))), Any)
        visits = ShardStream(dataset, "train", batch_size=4, parse=webdataset_sample, collate=lambda s, v: v)
        assert_type(next(iter(visits)), int)
