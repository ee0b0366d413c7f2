"""From what a user asks for to a plan: the sources are read, images selected, masks located."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from builder.annotations import (
    Annotation,
    Metadata,
    SplitTables,
    annotate,
    images_by_class,
    read_metadata,
    read_split,
    read_verified,
)
from builder.classes import Classes, read_taxonomy
from builder.maskzip import locate_members
from builder.openimages import SOURCE_SPLITS, OpenImages
from builder.plan import Member, Plan, PlannedImage, PlannedObject, ShardTask, cut_tasks, make_plan
from builder.selection import partition_of, select_images
from shards.dataset import SPLITS
from shards.errors import UserError

ZIPS_AT_ONCE = 4  # a real train zip's directory takes about 100 MB in memory while it is read

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What a user asks for.

    Attributes:
        classes: names or MIDs.
        per_class: images a class in train.
        eval_per_class: images a class in val, and in test.
        exact: children of a class do not count.
        partition: fractions of the source's train split for train, val and test; None for the official splits.
        seed: of the selection, the order in the shards and the partition.
        images_per_shard: the unit of work; the last shard of a split may hold fewer.
    """

    classes: tuple[str, ...]
    per_class: int
    eval_per_class: int
    exact: bool = False
    partition: tuple[float, float, float] | None = None
    seed: int = 0
    images_per_shard: int = 256

    def quota(self, split: str) -> int:
        """Images a class in one of our splits."""
        return self.per_class if split == "train" else self.eval_per_class


@dataclass(frozen=True, slots=True)
class ClassReport:
    """What selection gave a class in one of our splits.

    Attributes:
        asked: images, the quota.
        available: images that count for the class (see `annotations.images_by_class`).
        chosen: of these.
        masks, boxes: of the class in all chosen images, some of which were chosen for another class.
    """

    split: str
    name: str
    asked: int
    available: int
    chosen: int
    masks: int
    boxes: int


def prepare(source: OpenImages, choice: Choice) -> tuple[Plan, list[ClassReport]]:
    """Read the annotation tables, choose images, find their masks, and plan the shards.

    Raises:
        UserError: an unknown class, a damaged table, or nothing to choose.
        StorageError: a table or zip cannot be had.
    """
    classes = read_taxonomy(source).choose(choice.classes, exact=choice.exact)
    tasks: list[ShardTask] = []
    reports: list[ClassReport] = []
    for source_split, splits in _splits(choice).items():
        logger.info("reading the annotations of %s", source_split)
        tables = read_split(source, source_split, classes)
        by_class = images_by_class(tables, classes)
        candidates = {split: _candidates(by_class, split, choice) for split in splits}
        chosen = {split: select_images(candidates[split], choice.quota(split), choice.seed) for split in splits}
        planned = _plan_images(source, source_split, classes, tables, [i for ids in chosen.values() for i in ids])
        for split in splits:
            images = [planned[image_id] for image_id in chosen[split]]
            tasks += cut_tasks(split, images, choice.images_per_shard)
            reports += _report(split, classes, candidates[split], images, choice)
    if not tasks:
        names = ", ".join(category.name for category in classes.categories)
        raise UserError(
            f"no image of the splits asked for has a mask or a box of {names}: choose other classes, "
            "or check --annotations"
        )
    return make_plan(classes.categories, tasks), reports


def _splits(choice: Choice) -> dict[str, tuple[str, ...]]:
    """Source split -> our splits that are cut from it."""
    if choice.partition is None:
        return {SOURCE_SPLITS[split]: (split,) for split in SPLITS if choice.quota(split) > 0}
    parts = zip(SPLITS, choice.partition)
    return {"train": tuple(split for split, part in parts if part > 0 and choice.quota(split) > 0)}


def _candidates(by_class: Mapping[int, list[str]], split: str, choice: Choice) -> dict[int, list[str]]:
    fractions = choice.partition
    if fractions is None:
        return dict(by_class)
    part = SPLITS.index(split)
    return {
        category: [image for image in images if partition_of(image, fractions, choice.seed) == part]
        for category, images in by_class.items()
    }


def _plan_images(
    source: OpenImages, source_split: str, classes: Classes, tables: SplitTables, image_ids: Sequence[str]
) -> dict[str, PlannedImage]:
    """All that the tables and the zips' directories say of the chosen images; each is read once."""
    annotations = annotate(tables, classes, image_ids)
    verified = read_verified(source, source_split, classes, image_ids)
    metadata = read_metadata(source, source_split, image_ids)
    members = _locate_masks(source, source_split, annotations)
    planned: dict[str, PlannedImage] = {}
    for image_id, objects in annotations.items():
        present, absent = classes.verified(
            *verified.get(image_id, (frozenset(), frozenset())),
            annotated=frozenset(annotation.category_id for annotation in objects),
        )
        planned[image_id] = PlannedImage(
            image_id=image_id,
            url=source.image(source_split, image_id).url,
            objects=tuple(PlannedObject(annotation, members.get(annotation.mask_path)) for annotation in objects),
            verified_present=present,
            verified_absent=absent,
            metadata=metadata.get(image_id, Metadata()),
        )
    return planned


def _locate_masks(
    source: OpenImages, source_split: str, annotations: Mapping[str, Iterable[Annotation]]
) -> dict[str, Member]:
    """Mask path -> its place in a zip; masks that no zip holds are left out."""
    wanted: dict[str, list[str]] = {}
    for image_id, objects in annotations.items():
        paths = [annotation.mask_path for annotation in objects if annotation.mask_path]
        # The zips go by a hex digit; an ImageID that starts otherwise has no zip, and its masks are missing.
        if paths and image_id[0] in "0123456789abcdefABCDEF":
            wanted.setdefault(image_id[0].lower(), []).extend(paths)
    if not wanted:
        return {}
    logger.info("locating %d masks of %s in %d zips", sum(map(len, wanted.values())), source_split, len(wanted))
    digits = sorted(wanted)
    with ThreadPoolExecutor(ZIPS_AT_ONCE) as pool:
        found = pool.map(lambda digit: locate_members(source.mask_zip(source_split, digit), wanted[digit]), digits)
        return {name: member for members in found for name, member in members.items()}


def _report(
    split: str,
    classes: Classes,
    candidates: Mapping[int, list[str]],
    images: Sequence[PlannedImage],
    choice: Choice,
) -> list[ClassReport]:
    chosen = {image.image_id for image in images}
    annotations = [planned.annotation for image in images for planned in image.objects]
    boxes = Counter(annotation.category_id for annotation in annotations)
    masks = Counter(annotation.category_id for annotation in annotations if annotation.mask_path)
    return [
        ClassReport(
            split=split,
            name=category.name,
            asked=choice.quota(split),
            available=len(candidates[category.id]),
            chosen=sum(image_id in chosen for image_id in candidates[category.id]),
            masks=masks[category.id],
            boxes=boxes[category.id],
        )
        for category in classes.categories
    ]
