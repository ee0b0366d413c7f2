"""Inference over a split of a shard dataset, on any number of ranks, which can be stopped and resumed.

    <out>/parts/<key>/part-00003.jsonl      one line per image, an `image_record`; written whole or not at all

The images of the split are divided into parts of consecutive images, independently of the ranks. Each rank writes its
share of the missing parts; when all exist, the main rank joins them in the order of the index. The key is a hash of
everything that determines the content of the parts, so that parts of another run are never used.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import chain, islice, starmap
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from shards.commands.command_line import say
from shards.commands.progress import Progress
from shards.common.errors import UserError
from shards.common.text import counted
from shards.format.dataset import Dataset
from shards.format.sample import Sample
from shards.storage.location import Location
from shards.stream.loader import loader
from shards.stream.streams import EvalStream
from trainer.config.command_options import PredictOptions
from trainer.data.collate import EvalCollate
from trainer.model.build import num_classes
from trainer.model.checkpoint import State, numbers_in
from trainer.prediction.like_batches import detect_in_order
from trainer.prediction.output_files import COCO_FILE, Labels, PredictionFiles, image_record, write_picture
from trainer.run.distributed import from_main

PICTURES = "pictures"
VERSION = 2  # of what else determines the parts; in version 1 batches had images of several shapes

log = logging.getLogger("trainer.prediction.sharded_inference")


class ShardImage(NamedTuple):
    """An image of the split: its annotations, and its pixels, uint8 [3, H, W] RGB."""

    sample: Sample
    pixels: Tensor


@dataclasses.dataclass(frozen=True)
class Parts:
    """A split of `images` images in parts of `size`, a multiple of the batch size, with a file each in `folder`."""

    folder: Location
    images: int
    size: int

    def __len__(self) -> int:
        return -(-self.images // self.size)

    def place(self, number: int) -> Location:
        """Return the file of a part."""
        return self.folder / f"part-{number:05d}.jsonl"

    def rows(self, number: int) -> NDArray[np.int64]:
        """Return the rows of the split's index that are in a part."""
        return np.arange(number * self.size, min((number + 1) * self.size, self.images), dtype=np.int64)

    def missing(self) -> list[int]:
        """Return the parts that are not written, ascending."""
        return sorted(set(range(len(self))) - set(numbers_in(self.folder, r"part-(\d+)\.jsonl")))

    def write(self, number: int, records: Sequence[dict[str, Any]]) -> None:
        """Write a part, whole or not at all."""
        lines = (json.dumps(record, separators=(",", ":"), allow_nan=False) for record in records)
        self.place(number).write("".join(f"{line}\n" for line in lines).encode("utf-8"))

    def read(self, number: int) -> list[dict[str, Any]]:
        """Return the records of a part; UserError if the file is damaged."""
        place, images = self.place(number), len(self.rows(number))
        try:
            records = [json.loads(line) for line in place.read().splitlines()]
            if len(records) != images:
                raise ValueError(f"{counted(len(records), 'image')} instead of {images}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is damaged ({error}): delete it and run the command again") from error
        return records


def predict_shards(
    options: PredictOptions,
    dataset: Dataset,
    state: State,
    network: MaskRCNN,
    accelerator: Accelerator,
    labels: Labels | None,
) -> None:
    """Process the missing parts and join all of them. Every rank must call this; only the main one joins.

    `network` is that of the checkpoint `state`, on the device and in evaluation mode. Without `labels` there is no
    submission.
    """
    out, images = Location(options.out), len(dataset.index(options.split))
    size = -(-options.part_images // options.batch_size) * options.batch_size
    parts = Parts(out / "parts" / parts_key(options, dataset, state, size), images, size)
    main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    missing: list[int] = from_main(parts.missing() if main else None)
    if main:
        done = f"{len(parts) - len(missing)} of {counted(len(parts), 'part')} done already"
        say(f"{counted(images, 'image')} of {options.split}: {done}")
    for number, records in _predict_parts(options, dataset, state, network, accelerator, parts, missing[rank::world]):
        parts.write(number, records)
        objects = sum(len(record["annotations"]) for record in records)
        say(f"{parts.place(number)}: {counted(objects, 'object')}")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # the other ranks do not wait until the parts are joined
    if main:
        with PredictionFiles(out, state.categories, labels) as files:
            for number in range(len(parts)):
                for record in parts.read(number):
                    files.add(record)
        say(f"{out / COCO_FILE}: {files.counts()}")


def parts_key(options: PredictOptions, dataset: Dataset, state: State, size: int) -> str:
    """Hash what determines the parts: weights and settings of the network, the index, and the options."""
    settings = [VERSION, options.split, options.score, options.batch_size, size, bool(options.pictures)]
    return inference_key(settings, dataset, state)


def inference_key(settings: Sequence[Any], dataset: Dataset, state: State) -> str:
    """Hash weights and settings of the network, the index, and further settings, JSON-serialisable."""
    digest = hashlib.blake2b(digest_size=8)
    network = [dataclasses.asdict(state.config.model), state.config.data.min_size, state.config.data.max_size]
    classes = [dataclasses.asdict(category) for category in state.categories]
    digest.update(json.dumps([settings, network, classes], default=str).encode("utf-8"))
    digest.update(hashlib.sha256(dataset.columns.data).digest())
    for name, tensor in sorted(state.weights.items()):
        digest.update(name.encode("utf-8"))
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _predict_parts(
    options: PredictOptions,
    dataset: Dataset,
    state: State,
    network: MaskRCNN,
    accelerator: Accelerator,
    parts: Parts,
    numbers: Sequence[int],
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield this rank's parts with their records, from one loader that reads ahead across parts."""
    if not numbers:
        return
    data, out = state.config.data, Location(options.out)
    stream = EvalStream(
        dataset,
        options.split,
        batch_size=options.batch_size,
        read_ahead=data.read_ahead_mb * 2**20,
        stall_s=data.stall_s,
        collate=EvalCollate(num_classes(dataset.categories)),
        rows=np.concatenate([parts.rows(number) for number in numbers]),
    )
    batches = loader(stream, workers=options.workers, pin_memory=accelerator.device.type == "cuda")
    items = starmap(ShardImage, chain.from_iterable(zip(batch.samples, batch.images, strict=True) for batch in batches))
    total, main = sum(len(parts.rows(number)) for number in numbers), accelerator.is_main_process
    with Progress(f"predicting {options.split}", total, "images", log.info, is_shown=main) as progress:
        for number in numbers:
            records = []
            of_part = islice(items, len(parts.rows(number)))
            for (sample, pixels), found in detect_in_order(network, of_part, accelerator.device, options.batch_size):
                name = f"{sample.image_id}.jpg"
                record = image_record(sample.image_id, name, sample.width, sample.height, found)
                if options.pictures:
                    record["image"]["picture"] = f"{PICTURES}/{name}"
                    write_picture(out / PICTURES / name, pixels, found, state.categories)
                records.append(record)
                progress.advance(1)
            yield number, records
