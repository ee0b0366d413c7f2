"""From what a user asks for to a plan: the sources are read, images selected, masks located; and replacements."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from builder.planning.image_list import ListedImage, read_list
from builder.planning.selection import partition_of, seeded_order, select_images
from builder.sources.base import Filters, Source, SourceSplit
from builder.sources.taxonomy import Classes
from builder.tasks.candidates import Candidates
from builder.tasks.outcomes import Account
from builder.tasks.plan import Plan, PlannedImage, ShardTask, cut_tasks, make_plan
from shards.common.errors import UserError
from shards.common.text import counted
from shards.format.dataset import SPLITS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What a user asks for.

    Attributes:
        classes: names or MIDs; none for all of the source's.
        per_class: images a class in train; None for all that count.
        eval_per_class: images a class in val, and in test; None for all that count.
        exact: children of a class do not count.
        partition: fractions of the source's train split for train, val and test; None for the official splits.
        seed: of the selection, the order in the shards and the partition.
        images_per_shard: the unit of work; the last shard of a split may hold fewer.
        filters: which annotations and masks are wanted.
        all_annotations: annotations of other classes in the chosen images are kept as well.
        images_list: address of a list of the very images to take, whatever classes they hold; "" for none.
    """

    classes: tuple[str, ...]
    per_class: int | None
    eval_per_class: int | None
    exact: bool = False
    partition: tuple[float, float, float] | None = None
    seed: int = 0
    images_per_shard: int = 256
    filters: Filters = Filters()
    all_annotations: bool = False
    images_list: str = ""

    def quota(self, split: str) -> int | None:
        """Images a class in one of our splits; None for all."""
        return self.per_class if split == "train" else self.eval_per_class

    def part(self, image_id: str) -> str:
        """Which of our splits an image of the source's train split falls in."""
        assert self.partition is not None
        return SPLITS[partition_of(image_id, self.partition, self.seed)]


@dataclass(frozen=True, slots=True)
class ClassReport:
    """What selection gave a class in one of our splits.

    Attributes:
        asked: images, the quota; all that there are where there is none.
        available: images at the source that count for the class.
        masked: of these, with a mask of it.
        chosen: of the available ones.
        masks, boxes: of the class in all chosen images, some of which were chosen for another class.
        reason: why the class got less than was asked for, or other images than those with masks; "" for neither.
    """

    split: str
    name: str
    asked: int
    available: int
    masked: int
    chosen: int
    masks: int
    boxes: int
    reason: str = ""


@dataclass
class _Split:
    """One of our splits: where it is cut from, what may be chosen, what was chosen and what of it failed."""

    source: SourceSplit
    candidates: dict[int, Candidates]
    quota: int | None
    chosen: set[str]
    failed: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Preparation:
    """A plan, how it came about, and what may replace images that fail.

    Attributes:
        reports: of each split and class that was asked for.
        unknown: accounts of the images of `--images-list` that the source does not know.
    """

    plan: Plan
    reports: tuple[ClassReport, ...]
    unknown: tuple[Account, ...]
    seed: int
    splits: Mapping[str, _Split]

    def replacements(self, split: str, failed: Collection[str]) -> list[PlannedImage]:
        """The next images of the reserve, for the classes that fell below their quota because images failed.

        The same rules choose as at first, given all that was chosen and did not fail. What is returned counts as chosen
        from then on: no image is returned twice, nor one that ever failed. The same calls give the same images.

        Args:
            split: one of our splits.
            failed: images that could not be packed; those of earlier calls may be among them or not.

        Raises:
            UserError, StorageError: the annotations have changed or cannot be had.
        """
        state = self.splits.get(split)
        if state is None or state.quota is None:
            return []  # all that there is was chosen, or exactly what was listed
        state.failed.update(failed)
        good = state.chosen - state.failed
        fresh = select_images(state.candidates, state.quota, self.seed, taken=good, barred=state.failed)
        if not fresh:
            return []
        state.chosen.update(fresh)
        described = state.source.describe(fresh)
        return [described[image_id] for image_id in fresh]


def prepare(source: Source, choice: Choice) -> Preparation:
    """Read the annotations, choose images, find their masks, and plan the shards.

    Raises:
        UserError: an unknown class, damaged annotations, a damaged list, or nothing to choose.
        StorageError: a table, list or zip cannot be had.
    """
    classes = source.taxonomy().choose(choice.classes, exact=choice.exact, others=choice.all_annotations)
    listed = read_list(choice.images_list, source.splits) if choice.images_list else None
    tasks: list[ShardTask] = []
    reports: list[ClassReport] = []
    states: dict[str, _Split] = {}
    known: set[ListedImage] = set()
    for source_split, splits in _splits(source, choice).items():
        logger.info("reading the annotations of %s", source_split)
        opened = source.open_split(source_split, classes, choice.filters)
        if listed is None:
            states |= _select(opened, splits, choice)
        else:
            states |= _take_listed(opened, source_split, splits, choice, listed, known)
        chosen = {split: seeded_order(states[split].chosen, choice.seed) for split in splits}
        planned = opened.describe([image_id for ids in chosen.values() for image_id in ids])
        for split in splits:
            images = [planned[image_id] for image_id in chosen[split]]
            tasks += cut_tasks(split, images, choice.images_per_shard)
            reports += _report(split, classes, states[split], images, choice)
    unknown = _unknown(listed or (), known, source, choice)
    if not tasks:
        raise _nothing(classes, choice, len(unknown))
    rules = [choice.seed, {split: state.quota for split, state in states.items()}, asdict(choice.filters)]
    plan = make_plan(classes.categories, tasks, rules)
    return Preparation(plan, tuple(reports), unknown, choice.seed, states)


def _splits(source: Source, choice: Choice) -> dict[str, tuple[str, ...]]:
    """Source split -> our splits that are cut from it."""
    wanted = [split for split in SPLITS if choice.images_list or choice.quota(split) != 0]
    if choice.partition is None:
        return {source.splits[split]: (split,) for split in wanted if split in source.splits}
    parts = dict(zip(SPLITS, choice.partition))
    return {source.splits["train"]: tuple(split for split in wanted if parts[split] > 0)}


def _select(opened: SourceSplit, splits: Sequence[str], choice: Choice) -> dict[str, _Split]:
    """Our splits of a source split, chosen by quotas."""
    by_class = {
        category: Candidates(images.masked, () if choice.filters.require_mask else images.boxed)
        for category, images in opened.candidates().items()
    }
    found: dict[str, _Split] = {}
    for split in splits:
        mine = by_class if choice.partition is None else _part_of(by_class, split, choice)
        quota = choice.quota(split)
        found[split] = _Split(opened, mine, quota, set(select_images(mine, quota, choice.seed)))
    return found


def _part_of(by_class: Mapping[int, Candidates], split: str, choice: Choice) -> dict[int, Candidates]:
    def mine(images: Sequence[str]) -> tuple[str, ...]:
        return tuple(image_id for image_id in images if choice.part(image_id) == split)

    return {category: Candidates(mine(found.masked), mine(found.boxed)) for category, found in by_class.items()}


def _take_listed(
    opened: SourceSplit,
    source_split: str,
    splits: Sequence[str],
    choice: Choice,
    listed: Collection[ListedImage],
    known: set[ListedImage],
) -> dict[str, _Split]:
    """Our splits of a source split, as listed; what is found is added to `known`."""
    here = [image for image in listed if image.split in ("", source_split)]
    ids = opened.find({image.name for image in here})
    known.update(image for image in here if image.name in ids)
    chosen: dict[str, set[str]] = {split: set() for split in splits}
    for image_id in ids.values():
        split = splits[0] if choice.partition is None else choice.part(image_id)
        chosen[split].add(image_id)
    return {split: _Split(opened, {}, None, chosen[split]) for split in splits}


def _unknown(
    listed: Collection[ListedImage], found: Collection[ListedImage], source: Source, choice: Choice
) -> tuple[Account, ...]:
    """What was listed and not found, in the first split that was searched; logged, since that is seldom meant."""
    searched = _splits(source, choice)
    accounts = []
    for image in listed:
        if image not in found:
            split = searched.get(image.split, next(iter(searched.values())))[0]
            detail = f"in no table of {image.split or ', '.join(searched)}"
            if image.split and image.split not in searched:
                detail = f"{image.split} is not a split that is read"
            accounts.append(Account("image", split, image.name, "", image.name, "image-unknown", detail))
    if accounts:
        names = ", ".join(account.image_id for account in accounts[:3]) + (" ..." if len(accounts) > 3 else "")
        logger.warning(
            "%s: the source does not know %s: %s", choice.images_list, counted(len(accounts), "image"), names
        )
    return tuple(accounts)


def _report(
    split: str, classes: Classes, state: _Split, images: Sequence[PlannedImage], choice: Choice
) -> list[ClassReport]:
    """Of each class that was asked for; of a list, what its images hold."""
    objects = [(image.image_id, planned.annotation) for image in images for planned in image.objects]
    boxes = Counter(annotation.category_id for _, annotation in objects)
    masks = Counter(planned.annotation.category_id for image in images for planned in image.objects if planned.has_mask)
    reports = []
    for category in classes.wanted:
        available = state.candidates.get(category.id, Candidates())
        if choice.images_list:
            holding = {image_id for image_id, annotation in objects if annotation.category_id == category.id}
            available = Candidates(boxed=tuple(sorted(holding)))
        chosen = sum(image_id in state.chosen for images in (available.masked, available.boxed) for image_id in images)
        asked = len(available) if state.quota is None else state.quota
        reports.append(
            ClassReport(
                split=split,
                name=category.name,
                asked=asked,
                available=len(available),
                masked=len(available.masked),
                chosen=chosen,
                masks=masks[category.id],
                boxes=boxes[category.id],
                reason=_reason(available, asked, choice),
            )
        )
    return reports


def _reason(available: Candidates, asked: int, choice: Choice) -> str:
    where = "at the source" if choice.partition is None else "in this part of the source"
    if len(available) < asked:
        what = " with a mask" if choice.filters.require_mask else ""
        count = f"only {counted(len(available), 'image')}" if len(available) else "no images"
        return f"{count}{what} {where}"
    if len(available.masked) < asked and not choice.images_list:
        count = f"only {counted(len(available.masked), 'image')}" if available.masked else "no images"
        return f"{count} with a mask {where}, others have boxes only"
    return ""


def _nothing(classes: Classes, choice: Choice, unknown: int) -> UserError:
    if choice.images_list:
        return UserError(
            f"{choice.images_list}: the source knows no image that it lists ({unknown}): check the list, "
            "--splits and --annotations"
        )
    names = ", ".join(category.name for category in classes.wanted[:10])
    what = "a mask" if choice.filters.require_mask else "a mask or a box"
    return UserError(
        f"no image of the splits asked for has {what} of {names}: choose other classes or weaker filters, "
        "or check --annotations"
    )
