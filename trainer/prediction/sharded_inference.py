"""Inference over a split of a shard dataset, on any number of ranks, that can be stopped and goes on.

    <out>/parts/<key>/part-00003.jsonl      a line an image, as `image_record` made it; written whole or not at all

The split's images are cut into parts of neighbours. What a part is depends on no rank: the parts that are not there yet
are dealt out, each rank writes its own, and when all are there the main rank joins them in the order of the index. The
key is a hash of everything that the parts' content comes from, so that no part of another run is taken for one's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import UserError
from shards.common.text import counted
from shards.format.dataset import Dataset
from shards.storage.explain import storage_errors
from shards.storage.location import Location
from trainer.prediction.output_files import COCO_FILE, PredictionFiles, image_record, write_picture

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torchvision.models.detection import MaskRCNN

    from trainer.config.command_options import PredictOptions
    from trainer.model.checkpoint import State
    from trainer.prediction.output_files import Labels

PICTURES = "pictures"


@dataclasses.dataclass(frozen=True)
class Parts:
    """A split cut into parts.

    Attributes:
        folder: where they lie.
        images: of the split.
        size: images a part, a multiple of the batch size: a batch never spans two. The last part may be smaller.
    """

    folder: Location
    images: int
    size: int

    def __len__(self) -> int:
        return -(-self.images // self.size)

    def place(self, number: int) -> Location:
        """Where a part lies."""
        return self.folder / f"part-{number:05d}.jsonl"

    def rows(self, number: int) -> NDArray[np.int64]:
        """The rows of the split's index that a part is of."""
        return np.arange(number * self.size, min((number + 1) * self.size, self.images), dtype=np.int64)

    def missing(self) -> list[int]:
        """The parts that are not written, ascending.

        Raises:
            StorageError: the folder could not be listed.
        """
        with storage_errors(self.folder.url):
            try:
                names = self.folder.fs.ls(self.folder.path, detail=False)
            except FileNotFoundError:
                names = []
        found = (re.fullmatch(r"part-(\d+)\.jsonl", str(name).rsplit("/", 1)[-1]) for name in names)
        done = {int(match[1]) for match in found if match}
        return [number for number in range(len(self)) if number not in done]

    def write(self, number: int, records: Sequence[dict[str, Any]]) -> None:
        """Write a part, whole or not at all."""
        lines = (json.dumps(record, separators=(",", ":"), allow_nan=False) for record in records)
        self.place(number).write("".join(f"{line}\n" for line in lines).encode("utf-8"))

    def read(self, number: int) -> list[dict[str, Any]]:
        """The records of a part.

        Raises:
            UserError: it is damaged.
        """
        place = self.place(number)
        try:
            records = [json.loads(line) for line in place.read().splitlines()]
        except ValueError as error:
            raise UserError(f"{place} is damaged ({error}): delete it and give the command again") from error
        if len(records) != len(self.rows(number)):
            raise UserError(
                f"{place} is damaged ({counted(len(records), 'image')} instead of {len(self.rows(number))}): "
                "delete it and give the command again"
            )
        return records


def predict_shards(
    options: PredictOptions,
    dataset: Dataset,
    state: State,
    network: MaskRCNN,
    accelerator: Accelerator,
    labels: Labels | None,
) -> None:
    """Do the parts that are missing, and join all; each rank must call this.

    Args:
        options: `split`, `score`, `batch_size`, `part_images`, `workers`, `pictures` and `out`.
        dataset: only its images are looked at.
        state: of the checkpoint.
        network: on the device, in evaluation mode.
        accelerator: of this rank.
        labels: of the submission; None for no submission.

    The ranks part when all parts are there: the others do not wait for the main one to join them.

    Raises:
        UserError: a sample cannot be had, a part is damaged, or `out` cannot be written.
    """
    from trainer.run.distributed import from_main

    out, images = Location(options.out), len(dataset.index(options.split))
    size = -(-options.part_images // options.batch_size) * options.batch_size
    parts = Parts(out / "parts" / parts_key(options, dataset, state, size), images, size)
    main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    missing: list[int] = from_main(parts.missing() if main else None)
    if main:
        done = len(parts) - len(missing)
        told = f"{done} of {counted(len(parts), 'part')} done already"
        print(f"{counted(images, 'image')} of {options.split}: {told}", flush=True)
    for number, records in _predict_parts(options, dataset, state, network, accelerator, parts, missing[rank::world]):
        parts.write(number, records)
        objects = sum(len(record["annotations"]) for record in records)
        print(f"{parts.place(number)}: {counted(objects, 'object')}", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if main:
        with PredictionFiles(out, state.categories, labels) as files:
            for number in range(len(parts)):
                for record in parts.read(number):
                    files.add(record)
        print(f"{out / COCO_FILE}: {files.told()}", flush=True)


def parts_key(options: PredictOptions, dataset: Dataset, state: State, size: int) -> str:
    """A hash of what parts come from: weights and settings of the network, the index, and how they are put together."""
    import torch

    digest = hashlib.blake2b(digest_size=8)
    settings = [options.split, options.score, options.batch_size, size, bool(options.pictures)]
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
    """This rank's parts with their records, one after the other, from one loader that reads ahead of them."""
    from shards.stream.loader import loader
    from shards.stream.streams import EvalStream
    from trainer.data.collate import EvalCollate
    from trainer.model.inference import detect

    if not numbers:
        return
    data, out = state.config.data, Location(options.out)
    stream = EvalStream(
        dataset,
        options.split,
        batch_size=options.batch_size,
        read_ahead=data.read_ahead_mb * 2**20,
        stall_s=data.stall_s,
        collate=EvalCollate(),
        rows=np.concatenate([parts.rows(number) for number in numbers]),
    )
    left, records = list(numbers), list[dict[str, Any]]()
    for batch in loader(stream, workers=options.workers):
        found = detect(network, batch.images, accelerator.device)
        for sample, pixels, of_image in zip(batch.samples, batch.images, found, strict=True):
            name = f"{sample.image_id}.jpg"
            record = image_record(sample.image_id, name, sample.width, sample.height, of_image)
            if options.pictures:
                record["image"]["picture"] = f"{PICTURES}/{name}"
                write_picture(out / PICTURES / name, pixels, of_image, state.categories)
            records.append(record)
        if len(records) == len(parts.rows(left[0])):
            yield left.pop(0), records
            records = []
