"""`inspect-shards`: what a shard dataset holds, told from its index."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shards.dataset import Dataset, open_dataset
from shards.errors import UserError
from shards.storage import Location


@dataclass(frozen=True)
class ClassCounts:
    """One class in one split: images that have it, its boxes, those with a mask, those that are group-of regions."""

    name: str
    images: int
    boxes: int
    masks: int
    groups: int


@dataclass(frozen=True)
class SplitReport:
    """One split: images, shards, bytes, the images' median size in pixels, and its classes by id."""

    split: str
    images: int
    shards: int
    nbytes: int
    median_width: int
    median_height: int
    classes: tuple[ClassCounts, ...]


def report(dataset: Dataset) -> tuple[SplitReport, ...]:
    """Count every split of a dataset; the shards themselves are not read."""
    return tuple(_split_report(dataset, split) for split in dataset.splits)


def _split_report(dataset: Dataset, split: str) -> SplitReport:
    index = dataset.index(split)
    counts = {name: index.counts(name, dataset.categories) for name in ("images", "instances", "masks", "groups")}
    shards = [shard for shard in dataset.info.shards if shard.split == split]
    return SplitReport(
        split=split,
        images=len(index),
        shards=len(shards),
        nbytes=sum(shard.nbytes for shard in shards),
        median_width=int(np.median(index.width)) if len(index) else 0,
        median_height=int(np.median(index.height)) if len(index) else 0,
        classes=tuple(
            ClassCounts(
                category.name,
                counts["images"][category.id],
                counts["instances"][category.id],
                counts["masks"][category.id],
                counts["groups"][category.id],
            )
            for category in dataset.categories
        ),
    )


def render(dataset: Dataset, splits: Sequence[SplitReport]) -> str:
    """The report as a text that a person reads."""
    lines = [f"{dataset.root}", f"plan {dataset.info.plan[:16] or 'unknown'}", ""]
    for split in splits:
        lines.append(
            f"{split.split}: {split.images} images in {split.shards} shards, {split.nbytes / 1e6:.1f} MB, "
            f"median {split.median_width}x{split.median_height} pixels"
        )
        lines.append(f"  {'class':24} {'images':>9} {'boxes':>9} {'masks':>9} {'masked':>8} {'group-of':>9}")
        for row in (row for row in split.classes if row.images):
            objects = row.boxes - row.groups
            share = f"{row.masks / objects:.0%}" if objects else "-"
            lines.append(f"  {row.name:24} {row.images:>9} {row.boxes:>9} {row.masks:>9} {share:>8} {row.groups:>9}")
        empty = sum(not row.images for row in split.classes)
        lines += [f"  ({empty} more of the classes are in no image)", ""] if empty else [""]
    lines.append("boxes: every annotation; masked: the share of objects (group-of regions aside) that have a mask.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `inspect-shards`; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="inspect-shards",
        description="Counts of images, classes, masks and boxes of a shard dataset, from its index alone.",
        epilog="example: inspect-shards s3://bucket/prefix",
    )
    parser.add_argument("root", help="the dataset: s3://bucket/prefix, a local path, any fsspec URL")
    parser.add_argument("--anonymous", action="store_true", help="do not sign S3 requests (public buckets)")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    arguments = parser.parse_args(argv)
    try:
        dataset = open_dataset(Location(arguments.root, anonymous=arguments.anonymous))
        splits = report(dataset)
    except UserError as error:
        print(f"inspect-shards: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        value: dict[str, Any] = {"root": str(dataset.root), "plan": dataset.info.plan}
        print(json.dumps(value | {"splits": [asdict(split) for split in splits]}, indent=2, ensure_ascii=False))
    else:
        print(render(dataset, splits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
