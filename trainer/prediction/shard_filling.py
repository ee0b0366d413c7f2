"""Masks for the objects of a dataset that have a box only, on any number of ranks; can be stopped and resumed.

The unit of work is a shard: each rank writes its share of the missing ones, and the main rank finishes the dataset when
all exist. Batches do not cross shards, so that the bytes do not depend on the ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from accelerate import Accelerator
from torchvision.models.detection import MaskRCNN

from shards.commands.command_line import say
from shards.commands.progress import Progress
from shards.common.text import counted
from shards.format.sample import Sample
from shards.format.shard_tar import pack_shard
from shards.stream.loader import loader
from shards.stream.streams import EvalStream
from trainer.config.command_options import FillOptions
from trainer.config.settings import DataConfig
from trainer.model.box_masks import mask_batches
from trainer.prediction.box_objects import BoxedSample, FillCollate, Tally, tally, with_masks
from trainer.prediction.filled_dataset import FilledDataset
from trainer.prediction.like_batches import in_order, like_batches
from trainer.run.distributed import from_main

log = logging.getLogger("trainer.prediction.shard_filling")


@dataclass(frozen=True)
class MaskPredictor:
    """What predicts the masks.

    Attributes:
        network: in evaluation mode on the device.
        classes: ids of the classes that get masks.
        run: name of its run.
        margin: of RoIs, see `mask_batches`.
    """

    network: MaskRCNN
    classes: frozenset[int]
    run: str
    margin: float


def fill_shards(
    options: FillOptions, target: FilledDataset, predictor: MaskPredictor, data: DataConfig, accelerator: Accelerator
) -> Tally | None:
    """Write the missing shards and finish the dataset. Every rank must call this; the tally is the main one's."""
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    missing: list[int] = from_main(target.missing() if main else None)
    if main:
        done = f"{len(target.shards) - len(missing)} of {counted(len(target.shards), 'shard')} done already"
        say(f"{target.source.root}: {done}")
    to_copy = [number for number in missing if target.shards[number].split not in target.splits]
    to_fill = [number for number in missing if target.shards[number].split in target.splits]
    with Progress("copying", len(to_copy[rank::world]), "shards", log.info, is_shown=main) as progress:
        for number in to_copy[rank::world]:
            target.copy(number)
            progress.advance(1)
    for split in target.splits:
        own = [number for number in to_fill[rank::world] if target.shards[number].split == split]
        _fill_split(options, target, predictor, data, accelerator, split, own)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # the other ranks do not wait until the dataset is finished
    return target.finish() if main else None


def _fill_split(
    options: FillOptions,
    target: FilledDataset,
    predictor: MaskPredictor,
    data: DataConfig,
    accelerator: Accelerator,
    split: str,
    numbers: Sequence[int],
) -> None:
    """Write some shards of a split, from one loader that reads ahead across shards.

    A shard is packed and written while the next one is filled.
    """
    if not numbers:
        return
    index = target.source.index(split)
    positions = [index.shard_paths.index(target.shards[number].path) for number in numbers]
    rows = np.flatnonzero(np.isin(index.shard, positions))
    stream = EvalStream(
        target.source,
        split,
        batch_size=options.batch_size,
        read_ahead=data.read_ahead_mb * 2**20,
        stall_s=data.stall_s,
        collate=FillCollate(predictor.classes),
        rows=rows,
    )
    batches = loader(stream, workers=options.workers, pin_memory=accelerator.device.type == "cuda")
    items = chain.from_iterable(batch.samples for batch in batches)
    shown = Progress(f"filling {split}", len(rows), "images", log.info, is_shown=accelerator.is_main_process)
    with shown as progress, ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        for number in numbers:
            of_shard = islice(items, target.shards[number].samples)
            samples = _filled(options, predictor, accelerator, of_shard, progress)
            if writing is not None:
                writing.result()
            writing = pool.submit(_write, target, number, samples, predictor.classes)
        if writing is not None:
            writing.result()


def _write(target: FilledDataset, number: int, samples: Sequence[Sample], classes: Set[int]) -> None:
    shard, found = target.shards[number], tally(samples, classes)
    target.write(number, pack_shard(samples, split=shard.split, path=shard.path), found)
    say(f"{target.out / shard.path}: {counted(found.masks.total(), 'mask')} predicted")


def _filled(
    options: FillOptions,
    predictor: MaskPredictor,
    accelerator: Accelerator,
    items: Iterable[Sample | BoxedSample],
    progress: Progress,
) -> list[Sample]:
    """Return the samples of a shard with their masks, in the given order."""
    samples: dict[str, Sample] = {}

    def boxed() -> Iterator[BoxedSample]:
        for item in items:
            sample = item if isinstance(item, Sample) else item.sample
            samples[sample.image_id] = sample
            if isinstance(item, BoxedSample):
                yield item
            progress.advance(1)

    batches = like_batches(predictor.network, boxed(), options.batch_size)
    for item, masks in in_order(mask_batches(predictor.network, batches, accelerator.device, predictor.margin)):
        samples[item.sample.image_id] = with_masks(item, masks, predictor.run, options.score)
    return list(samples.values())
