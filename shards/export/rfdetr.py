"""RF-DETR's tar shards, for its `dataset_file="webdataset"`.

The layout is that of rfdetr 1.11.2 (`rfdetr/datasets/webdataset/index.py`, index version 1): `<split>-index.json` names
the tars of a split; a sample is an image and a JSON object with the image's id, a number, and COCO's annotations.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from itertools import chain

from shards.export.coco import annotation_entries, categories
from shards.export.export import Export, Tally, samples, write
from shards.format.sample import Sample, canonical_json, extension_of
from shards.format.shard_tar import member_header
from shards.storage.local_files import atomic_write

INDEX_VERSION = 1
EMPTY_MASKS = "objects without a mask, which RF-DETR trains as empty masks: --masks-only leaves them out"
GROUPS = "group-of regions, which RF-DETR leaves out"


def write_split(export: Export, tally: Tally) -> None:
    """Write the tars of a split, in memory for a few images, then its index."""
    shards: dict[str, int] = {}  # name -> samples
    annotated: set[int] = set()
    images = samples(export, tally)
    while (first := next(images, None)) is not None:
        name = f"{tally.split}-{len(shards):06d}.tar"
        with atomic_write(str(export.out / name)) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                before = tally.images - 1
                annotated |= _add(tar, chain([first], images), export.shard_bytes, tally)
        shards[name] = tally.images - before
    index = {
        "version": INDEX_VERSION,
        "split": tally.split,
        "shards": list(shards),
        "num_samples": tally.images,
        "categories": categories(export.dataset),
        "annotated_category_ids": sorted(annotated),
        "category_ids": "remap",  # labels count from 0 in the order of the categories
        "samples_per_shard": list(shards.values()),
    }
    write(export.out / f"{tally.split}-index.json", canonical_json(index))


def next_step(export: Export, tallies: Sequence[Tally]) -> str:
    """Return the call that trains on the files."""
    if not (export.out / "train-index.json").exists():
        return "export train to the same folder: RF-DETR takes the classes of every split from it"
    call = f"RFDETRSegNano().train(dataset_file='webdataset', dataset_dir={str(export.out)!r})"
    return f"{call}, with num_workers up to the number of shards"


def _add(tar: tarfile.TarFile, images: Iterable[tuple[int, Sample]], most_bytes: int, tally: Tally) -> set[int]:
    """Add images until the tar has `most_bytes`; return the ids of the classes that they have."""
    classes: set[int] = set()
    for number, sample in images:
        entries = annotation_entries(sample, number, tally)
        classes |= {entry["category_id"] for entry in entries}
        tally.remarks[GROUPS] += sum(entry["iscrowd"] for entry in entries)
        tally.remarks[EMPTY_MASKS] += sum(not (entry["iscrowd"] or entry["segmentation"]) for entry in entries)
        value = {"image_id": number, "file_name": sample.file_name, "annotations": entries}
        for extension, data in ((extension_of(sample.image), sample.image), ("json", canonical_json(value))):
            tar.addfile(member_header(f"{sample.image_id}.{extension}", len(data)), io.BytesIO(data))
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them for reading back
        if tar.offset >= most_bytes:
            break
    return classes
