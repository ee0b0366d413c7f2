"""`--dry-run`: what a build would hold and cost, before any of it is fetched."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from builder.commands.build import PreparedBuild
from builder.fetching.fetch import Refusal, describe, length_of
from builder.fetching.traffic import Traffic
from builder.fetching.zip_members import plan_reads
from builder.packing.pack import SPARE_BYTES_PER_IMAGE, members_of
from builder.planning.class_report import ClassReport
from builder.sources.base import Source
from builder.sources.openimages.layout import PUBLIC_IMAGES, source_location
from builder.sources.openimages.source import OpenImages
from builder.tasks.plan import InlineMask, Member, Plan, PlannedImage
from shards.format.dataset import SPLITS
from shards.format.dataset_card import ClassCounts
from shards.storage.location import Location

SAMPLED = 64  # images whose length is asked for; the mean of Open Images' lengths is then known to about 8 %

# All images of a split, in bytes: https://github.com/cvdfoundation/open-images-dataset
PUBLIC_SPLIT_BYTES = {"train": 513e9, "validation": 12e9, "test": 36e9}

# What a sample's JSON and tar headers take, roughly: within a quarter on drawn scenes, not measured on Open Images.
SAMPLE_BYTES, OBJECT_BYTES, RLE_OF_PNG = 2000, 270, 0.35


@dataclass(frozen=True)
class Estimate:
    """What a build would hold and cost.

    Attributes:
        plan: its fingerprint.
        chosen: what selection gave each class.
        counts: what would be packed if nothing failed.
        shards, images: of all splits.
        tables: read to make the plan, measured: tables and zip directories that were not in the cache.
        jpegs: to be read; the bytes are the mean of a sample, times the images.
        jpegs_error: one standard error of these bytes.
        sampled, unavailable: images whose length was asked for, and those of them that cannot be had.
        masks: to be read from zips, exactly, if nothing has to be read again.
        masks_wanted: bytes of these that are masks; the rest is read between them to save requests.
        output: bytes of the shards, estimated.
        whole_zips: bytes of the zips that hold any of these masks.
        whole_tables: bytes of the tables; None where the source does not say which they are.
        whole_images: bytes of all images of these splits; None where that is not known.
    """

    plan: str
    chosen: tuple[ClassReport, ...]
    counts: tuple[ClassCounts, ...]
    shards: int
    images: int
    tables: Traffic
    jpegs: Traffic
    jpegs_error: int
    sampled: int
    unavailable: int
    masks: Traffic
    masks_wanted: int
    output: int
    whole_zips: int
    whole_tables: int | None
    whole_images: int | None


def estimate(begun: PreparedBuild) -> Estimate:
    """Estimate what a build would hold and cost. Nothing is written.

    Raises:
        StorageError: a place cannot be reached or read.
    """
    source, preparation = begun.source, begun.preparation
    plan = preparation.plan
    images = [image for task in plan.tasks for image in task.images]
    lengths, unavailable = _sample(images, source.images.anonymous, preparation.seed)
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / max(1, len(lengths) - 1))
    masks, wanted = _mask_traffic(plan)
    objects = [planned for image in images for planned in image.objects]
    rle = sum(_rle_bytes(planned.mask) for planned in objects)
    return Estimate(
        plan=plan.fingerprint,
        chosen=preparation.reports,
        counts=tuple(planned_counts(plan)),
        shards=len(plan.tasks),
        images=len(images),
        tables=begun.tables,
        jpegs=Traffic(len(images), round(mean * len(images))),
        jpegs_error=round(spread / math.sqrt(max(1, len(lengths))) * len(images)),
        sampled=len(lengths) + unavailable,
        unavailable=unavailable,
        masks=masks,
        masks_wanted=wanted,
        output=round((mean + SAMPLE_BYTES) * len(images) + OBJECT_BYTES * len(objects) + rle),
        whole_zips=_whole_zips(plan, source.annotations.anonymous),
        whole_tables=_whole_tables(source, plan),
        whole_images=_whole_images(source, plan),
    )


def planned_counts(plan: Plan) -> list[ClassCounts]:
    """Images, masks, boxes and group-of regions a split and class, as they would be packed."""
    totals: Counter[tuple[str, int, str]] = Counter()
    for task in plan.tasks:
        for image in task.images:
            for category in {planned.annotation.category_id for planned in image.objects}:
                totals[task.split, category, "images"] += 1
            for planned in image.objects:
                kind = task.split, planned.annotation.category_id
                totals[*kind, "boxes"] += 1
                totals[*kind, "masks"] += isinstance(planned.mask, Member | InlineMask)
                totals[*kind, "groups"] += planned.annotation.is_group_of
    kinds = ("images", "masks", "boxes", "groups")
    return [
        ClassCounts(split, category.name, *(totals[split, category.id, kind] for kind in kinds))
        for split in SPLITS
        if any(task.split == split for task in plan.tasks)
        for category in plan.categories
    ]


def _sample(images: Sequence[PlannedImage], anonymous: bool, seed: int) -> tuple[list[int], int]:
    """Lengths of a seeded sample of the images, in bytes, and how many of it cannot be had."""
    chosen = random.Random(seed).sample(range(len(images)), min(SAMPLED, len(images)))
    found = _lengths([Location(images[index].url, anonymous) for index in chosen])
    lengths = [length for length in found if length is not None]
    return lengths, len(found) - len(lengths)


def _lengths(locations: Sequence[Location]) -> list[int | None]:
    """The objects' lengths; None for what is missing or refused."""
    answers = zip(locations, describe(locations), strict=True)
    return [None if isinstance(told, Refusal) else length_of(location, told) for location, told in answers]


def _mask_traffic(plan: Plan) -> tuple[Traffic, int]:
    """Requests and bytes of all tasks' reads of zips, and how many of these bytes are wanted."""
    requests = nbytes = wanted = 0
    for task in plan.tasks:
        members = members_of(task.images)
        spans = plan_reads(members, spare=SPARE_BYTES_PER_IMAGE * len(task.images))
        requests += len(spans)
        nbytes += sum(span.end - span.start for span in spans)
        wanted += sum(member.end - member.start for member in members)
    return Traffic(requests, nbytes), wanted


def _rle_bytes(mask: object) -> float:
    if isinstance(mask, Member):
        return RLE_OF_PNG * mask.size
    return len(mask.segmentation) / 4 if isinstance(mask, InlineMask) else 0.0


def _whole_zips(plan: Plan, anonymous: bool) -> int:
    urls = sorted({member.zip_url for task in plan.tasks for member in members_of(task.images)})
    return sum(length or 0 for length in _lengths([Location(url, anonymous) for url in urls]))


def _whole_tables(source: Source, plan: Plan) -> int | None:
    if not isinstance(source, OpenImages):
        return None
    tables = [source.class_names, source.hierarchy]
    for split in _source_splits(source, plan):
        tables += [source.boxes(split), source.masks(split), source.labels(split), source.metadata(split)]
    return sum(length or 0 for length in _lengths(tables))


def _whole_images(source: Source, plan: Plan) -> int | None:
    if source.images.url != PUBLIC_IMAGES or not source_location(PUBLIC_IMAGES).anonymous:
        return None  # a mirror, perhaps of a part; also under the public name, at another endpoint
    return round(sum(PUBLIC_SPLIT_BYTES[split] for split in _source_splits(source, plan)))


def _source_splits(source: Source, plan: Plan) -> list[str]:
    """The source's splits that the images lie in: the folder before the file's name."""
    theirs = set(source.splits.values())
    return sorted({image.url.split("/")[-2] for task in plan.tasks for image in task.images} & theirs)
