"""What all formats share: the export that was asked for, its samples, its target folder, and what a split lost."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.commands.progress import Progress
from shards.common.errors import SampleError, UserError
from shards.common.text import shown
from shards.format.dataset import Dataset
from shards.format.image import exif_orientation, without_orientation
from shards.format.index import Index
from shards.format.sample import KEY, Sample
from shards.storage.local_files import atomic_write
from shards.stream.reader import SampleReader
from shards.stream.sample_decoders import parse_sample, read_sample

MARKER = "maskstream-export.json"
TURNED = "images whose EXIF orientation was set to 1, because objects are in the pixels as stored"
PREDICTED = "predicted masks, written like masks of the source"
UNMASKED = "objects without a mask, left out (--masks-only)"


@dataclass(frozen=True)
class Export:
    """A dataset, whole or a selection, and the local folder that it is written to in some format."""

    dataset: Dataset
    out: Path
    format: str
    masks_only: bool = False  # leave out objects without a mask
    shard_bytes: int = 100 * 2**20  # at which a tar is closed

    def to_json(self) -> dict[str, Any]:
        """Return what determines the files of a split."""
        selection = self.dataset.selection
        return {
            "format": self.format,
            "index of the dataset": self.dataset.info.index_sha256,
            "classes": [category.name for category in self.dataset.categories],
            "fraction": selection.fraction,
            "seed": selection.seed,
            "masks only": self.masks_only,
            "shard bytes": self.shard_bytes,
        }


@dataclass
class Tally:
    """What was written of a split; `remarks` count, by their text, what the format could not hold or changed."""

    split: str
    images: int = 0
    empty: int = 0  # images without an object
    objects: int = 0
    remarks: Counter[str] = field(default_factory=Counter)


def claim(export: Export) -> None:
    """Mark the target folder as this export's; a UserError if it holds something else."""
    out, marker, own = export.out, export.out / MARKER, export.to_json()
    if out.is_dir() and (others := sorted(path.name for path in out.iterdir())) and not marker.exists():
        held = f"{out}: the folder holds {shown(others[0])}, which is no export"
        raise UserError(f"{held}: give --out a new folder, or empty this one")
    if marker.exists():
        try:
            before = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UserError(f"{marker}: damaged: remove the folder, or give another --out")
        for name, value in own.items():
            if before.get(name) != value:
                held = f"{out}: the folder holds an export with {name} {shown(before.get(name))}, not {shown(value)}"
                raise UserError(f"{held}: give another --out, or remove the folder")
    with atomic_write(str(marker)) as file:
        file.write(json.dumps(own, indent=2).encode())


def samples(export: Export, tally: Tally) -> Iterator[tuple[int, Sample]]:
    """Yield the number and the sample of each image of a split, in the order of the index, and count the images.

    A terminal shows a progress bar. A SampleError is raised for one that cannot be read, or whose key could not be a
    file name.
    """
    index = export.dataset.index(tally.split)
    numbers = image_numbers(index)
    found = read(SampleReader(export.dataset.root, index), range(len(index)))
    with Progress(f"exporting {tally.split}", len(index), "images", _report) as progress:
        for row, sample in found:
            if export.masks_only:
                instances = tuple(instance for instance in sample.instances if instance.segmentation is not None)
                tally.remarks[UNMASKED] += len(sample.instances) - len(instances)
                sample = replace(sample, instances=instances)
            if export.format != "coco":
                tally.remarks[PREDICTED] += sum(one.prediction is not None for one in sample.instances)
            if exif_orientation(sample.image) != 1:
                tally.remarks[TURNED] += 1
                sample = replace(sample, image=without_orientation(sample.image))
            tally.images += 1
            progress.advance(1)
            yield int(numbers[row]), sample


def _report(line: str) -> None:
    print(f"export: {line}", file=sys.stderr, flush=True)


def read(reader: SampleReader, rows: range) -> Iterator[tuple[int, Sample]]:
    """Yield (row, sample) for rows of a reader's index."""
    root = str(reader.root)
    for row, data in reader.read(rows):
        sample = parse_sample(read_sample(data, reader.index, row, root))
        if not KEY.fullmatch(sample.image_id):
            raise SampleError(f"{root}: sample {shown(sample.image_id)}: the key is no file name: build it again")
        yield row, sample


def image_numbers(index: Index) -> NDArray[np.int64]:
    """Return the COCO id of each image of a split, int64 [N]: its own if all keys are COCO's 12 digits, else from 1."""
    if pc.all(pc.match_substring_regex(index.image_ids, r"^\d{12}$")).as_py():
        return np.asarray(pc.cast(index.image_ids, pa.int64()))
    return np.arange(1, len(index) + 1)


def write(place: Path, data: bytes) -> None:
    """Write a file whole or not at all; after a crash of the machine it has to be written again."""
    with atomic_write(str(place), durable=False) as file:
        file.write(data)
