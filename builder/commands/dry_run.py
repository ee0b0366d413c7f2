"""`--dry-run`: estimate what a build would pack and fetch."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from builder.commands.build import PreparedBuild
from builder.commands.image_check import check_images
from builder.fetching.fetch import Refusal, describe, length_of
from builder.fetching.traffic import Traffic
from builder.fetching.zip_members import plan_reads
from builder.packing.pack import SPARE_BYTES_PER_IMAGE, members_of
from builder.planning.class_report import ClassReport
from builder.sources.base import Source
from builder.sources.openimages.layout import PUBLIC_IMAGES, source_location
from builder.sources.openimages.source import OpenImages
from builder.tasks.plan import FoundMask, FractionalPolygon, InlineMask, Member, Plan, PlannedImage
from shards.format.dataset import SPLITS
from shards.format.dataset_card import ClassCounts
from shards.storage.location import Location

SAMPLED = 64  # images whose length is read; the mean length of Open Images is then known to about 8 %

# Size of all images of a split, in bytes: https://github.com/cvdfoundation/open-images-dataset
PUBLIC_SPLIT_BYTES = {"train": 513e9, "validation": 12e9, "test": 36e9}

# Approximate size of a sample's JSON and tar headers: within a quarter on drawn scenes, not measured on Open Images.
SAMPLE_BYTES, OBJECT_BYTES, RLE_OF_PNG = 2000, 270, 0.35


@dataclass(frozen=True)
class Estimate:
    """What a build would pack and fetch.

    Attributes:
        plan: fingerprint of the plan.
        chosen: reports of the selection, per split and class.
        counts: images, masks and boxes per split and class that would be packed if nothing failed.
        tables: measured traffic for tables and zip directories that were not in the cache.
        jpegs: estimated traffic for images: the mean length of a sample, times the number of images.
        jpegs_error: one standard error of the bytes of `jpegs`.
        sampled, unavailable: images whose length was requested, and how many of them are unavailable.
        masks: traffic for masks: exact, unless requests have to be repeated.
        masks_wanted: bytes of the masks themselves; the others are read between masks to save requests.
        output: estimated size of the shards, in bytes.
        whole_zips: size of the zips that contain any of these masks, in bytes.
        whole_tables, whole_images: size of the tables and of all images of these splits, in bytes; None if unknown.
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


def estimate(prepared: PreparedBuild) -> Estimate:
    """Estimate what a build would pack and fetch, without writing; a UserError if the images are not at their root."""
    source, planned = prepared.source, prepared.planned
    check_images(source, planned)
    plan = planned.plan
    images = [image for task in plan.tasks for image in task.images]
    lengths, unavailable = _sample(images, source.images.anonymous, planned.scope.seed)
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / max(1, len(lengths) - 1))
    masks, wanted = _mask_traffic(plan)
    objects = [one for image in images for one in image.objects]
    zips = [Location(url, source.annotations.anonymous) for url in sorted({m.zip_url for m in members_of(images)})]
    rle = sum(_rle_bytes(one.mask) for one in objects)
    return Estimate(
        plan=plan.fingerprint,
        chosen=planned.reports,
        counts=tuple(planned_counts(plan)),
        shards=len(plan.tasks),
        images=len(images),
        tables=prepared.tables,
        jpegs=Traffic(len(images), round(mean * len(images))),
        jpegs_error=round(spread / math.sqrt(max(1, len(lengths))) * len(images)),
        sampled=len(lengths) + unavailable,
        unavailable=unavailable,
        masks=masks,
        masks_wanted=wanted,
        output=round((mean + SAMPLE_BYTES) * len(images) + OBJECT_BYTES * len(objects) + rle),
        whole_zips=sum(length or 0 for length in _lengths(zips)),
        whole_tables=_whole_tables(source, plan),
        whole_images=_whole_images(source, plan),
    )


def planned_counts(plan: Plan) -> list[ClassCounts]:
    """Return the images, masks, boxes and group-of regions per split and class that would be packed."""
    totals: Counter[tuple[str, int, str]] = Counter()
    for task in plan.tasks:
        for image in task.images:
            for category in {planned.annotation.category_id for planned in image.objects}:
                totals[task.split, category, "images"] += 1
            for planned in image.objects:
                kind = task.split, planned.annotation.category_id
                totals[*kind, "boxes"] += 1
                source = "masks" if planned.annotation.prediction is None else "predicted"
                totals[*kind, source] += isinstance(planned.mask, FoundMask)
                totals[*kind, "groups"] += planned.annotation.is_group_of
    kinds = ("images", "masks", "boxes", "groups", "predicted")
    return [
        ClassCounts(split, category.name, *(totals[split, category.id, kind] for kind in kinds))
        for split in SPLITS
        if any(task.split == split for task in plan.tasks)
        for category in plan.categories
    ]


def _sample(images: Sequence[PlannedImage], anonymous: bool, seed: int) -> tuple[list[int], int]:
    """Return the lengths of a seeded sample of the images, in bytes, and how many are unavailable."""
    chosen = random.Random(seed).sample(range(len(images)), min(SAMPLED, len(images)))
    found = _lengths([Location(images[index].url, anonymous) for index in chosen])
    lengths = [length for length in found if length is not None]
    return lengths, len(found) - len(lengths)


def _lengths(locations: Sequence[Location]) -> list[int | None]:
    """Return the lengths of objects, None for missing or refused ones."""
    answers = zip(locations, describe(locations), strict=True)
    return [None if isinstance(one, Refusal) else length_of(location, one) for location, one in answers]


def _mask_traffic(plan: Plan) -> tuple[Traffic, int]:
    """Return the traffic of all reads of zips, and how many of the bytes are masks."""
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
    if isinstance(mask, FractionalPolygon):
        return len(mask.corners) / 4
    return len(mask.segmentation) / 4 if isinstance(mask, InlineMask) else 0.0


def _whole_tables(source: Source, plan: Plan) -> int | None:
    if not isinstance(source, OpenImages):
        return None
    tables = [source.class_names, source.hierarchy]
    for split in _source_splits(source, plan):
        tables += [source.boxes(split), source.masks(split), source.labels(split), source.metadata(split)]
    return sum(length or 0 for length in _lengths(tables))


def _whole_images(source: Source, plan: Plan) -> int | None:
    if source.images.url != PUBLIC_IMAGES or not source_location(PUBLIC_IMAGES).anonymous:
        return None  # a mirror may hold a part only, and another endpoint may have a bucket of the public name
    return round(sum(PUBLIC_SPLIT_BYTES[split] for split in _source_splits(source, plan)))


def _source_splits(source: Source, plan: Plan) -> list[str]:
    """Return the source's splits of the images: the folder in their URLs."""
    folders = {image.url.split("/")[-2] for task in plan.tasks for image in task.images}
    return sorted(folders & set(source.splits.values()))
