"""Plan a build: read the annotations, select images, locate their masks and cut shards."""

import logging
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from builder.planning.class_report import ClassReport, classes_held, explain_shortage, report_classes, warn_of_few_masks
from builder.planning.image_list import ImageList, ListedImage
from builder.planning.selection import Partition, Quotas, select_images
from builder.sources.base import Candidates, Filters, Source, SourceSplit
from builder.sources.taxonomy import Classes
from builder.tasks.plan import Plan, PlannedImage, ShardTask, cut_tasks, make_plan
from shards.common.errors import UserError
from shards.common.text import counted
from shards.format.accounts import UNKNOWN, Account
from shards.format.dataset import SPLITS
from shards.format.shard_tar import seeded_order

CONVERTED_ONLY = (".webp", ".gif", ".bmp", ".tif", ".tiff")  # names of images that shards do not hold

MIN_TRIED = 8  # images; that fewer are unavailable proves nothing about the others of their split

logger = logging.getLogger(__name__)


@dataclass
class _SplitState:
    """Candidates and selection of one split of the dataset, and the selected images that failed so far."""

    source: SourceSplit
    candidates: dict[int, Candidates]
    quota: int | None
    chosen: set[str]
    failed: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class BuildScope:
    """The images and annotations to pack, and how they are cut into shards.

    Attributes:
        class_names: names or MIDs of classes; empty for all classes of the source.
        exact_classes: do not count the children of a class in the hierarchy.
        all_annotations: keep annotations of all other classes in the selected images, too.
        partition: fractions of the source's train split for train, val and test; None for the source's own splits.
        seed: seed of the selection, of the order in the shards and of the partition.
        keep_empty: without a quota, select images without an object of the classes, too.
        to_jpeg: quality of JPEG, 1 to 100, to which images of other formats are converted; 0 for none.
    """

    class_names: Sequence[str]
    images: Quotas | ImageList
    exact_classes: bool = False
    all_annotations: bool = False
    filters: Filters = Filters()
    partition: tuple[float, float, float] | None = None
    seed: int = 0
    images_per_shard: int = 256
    keep_empty: bool = False
    to_jpeg: int = 0

    @property
    def parts(self) -> Partition | None:
        """The partition of the source's train split."""
        return None if self.partition is None else Partition(self.partition, self.seed)

    def recorded(self) -> dict[str, Any]:
        """Return the options under the names that `dataset.json` has for them."""
        quotas = self.images if isinstance(self.images, Quotas) else Quotas()
        return {
            "classes": self.class_names,
            "per_class": quotas.train,
            "eval_per_class": quotas.evaluation,
            "images_list": self.images.url if isinstance(self.images, ImageList) else "",
            "exact": self.exact_classes,
            "all_annotations": self.all_annotations,
            "filters": asdict(self.filters),
            "partition": self.partition,
            "seed": self.seed,
            "images_per_shard": self.images_per_shard,
            **({"keep_empty": True} if self.keep_empty else {}),
            **({"to_jpeg": self.to_jpeg} if self.to_jpeg else {}),
        }


@dataclass(frozen=True)
class PlannedBuild:
    """A plan, a report per split and requested class, and accounts of listed images that the source does not have."""

    plan: Plan
    reports: tuple[ClassReport, ...]
    unknown: tuple[Account, ...]
    scope: BuildScope
    splits: Mapping[str, _SplitState]

    def next_round(self, tasks: Sequence[ShardTask], failed: Mapping[str, Set[str]]) -> list[ShardTask]:
        """Return tasks that pack replacements of failed images; none once quotas are met or candidates run out.

        A split of which every image failed, and at least `MIN_TRIED`, gets none either: the root of the images is
        wrong. The same rule applies to all splits together.

        A round depends on nothing but the plan and the failures before it, so a resumed build repeats the same rounds.
        `tasks` are those of the plan and of all rounds so far, `failed` the images that failed, by split.
        """
        fresh: list[ShardTask] = []
        all_requested = {(task.split, image.image_id) for task in tasks for image in task.images}
        if _hopeless(all_requested, {(split, image_id) for split in SPLITS for image_id in failed[split]}):
            return []
        for split in SPLITS:
            of_split = [task for task in tasks if task.split == split]
            requested = {image_id for part, image_id in all_requested if part == split}
            missing = failed[split] & requested
            if missing and not _hopeless(requested, missing):
                images = [image for image in self.replacements(split, missing) if image.image_id not in requested]
                first = 1 + max(task.number for task in of_split)
                fresh += cut_tasks(split, images, self.scope.images_per_shard, first=first)
        return fresh

    def replacements(self, split: str, failed: Collection[str]) -> list[PlannedImage]:
        """Select replacements for the classes of a split that fell below their quota because images failed.

        The rules are those of the first selection, given all selected images that did not fail. The returned images
        count as selected from then on: no image is returned twice, and none that has failed. The same sequence of calls
        returns the same images.
        """
        state = self.splits.get(split)
        if state is None or state.quota is None:
            return []  # every candidate was selected, or exactly the listed images
        state.failed.update(failed)
        good = state.chosen - state.failed
        fresh = select_images(state.candidates, state.quota, self.scope.seed, taken=good, barred=state.failed)
        if not fresh:
            return []
        state.chosen.update(fresh)
        described = state.source.describe(fresh)
        return [described[image_id] for image_id in fresh]


def _hopeless(requested: Set[Any], failed: Set[Any]) -> bool:
    return len(requested) >= MIN_TRIED and requested <= failed


def plan_build(source: Source, scope: BuildScope) -> PlannedBuild:
    """Read the annotations, select images, locate their masks and plan the shards."""
    classes = source.taxonomy().choose(scope.class_names, exact=scope.exact_classes, others=scope.all_annotations)
    layout = _split_layout(source, scope)
    unknown: tuple[Account, ...] = ()
    if isinstance(scope.images, Quotas):
        states = _select(source, layout, classes, scope, scope.images)
    else:
        states, unknown = _take_listed(source, layout, classes, scope, scope.images)
    planned = _describe(layout, states, scope.seed)
    tasks = [task for split, found in planned.items() for task in cut_tasks(split, found, scope.images_per_shard)]
    if not tasks:
        raise _nothing_to_pack(classes, scope, len(unknown))
    rules: list[Any] = [scope.seed, {split: state.quota for split, state in states.items()}, asdict(scope.filters)]
    rules += [{"to_jpeg": scope.to_jpeg}] if scope.to_jpeg else []
    _warn_of_other_formats(tasks, scope)
    plan = make_plan(classes.categories, tasks, rules)
    reports = _report(planned, states, classes, scope)
    warn_of_few_masks(reports)
    return PlannedBuild(plan, reports, unknown, scope, states)


def _split_layout(source: Source, scope: BuildScope) -> dict[str, tuple[str, ...]]:
    """Return a dict from splits of the source to the splits of the dataset that are cut from them."""
    wanted = [split for split in SPLITS if isinstance(scope.images, ImageList) or scope.images.of(split) != 0]
    if scope.partition is None:
        return {source.splits[split]: (split,) for split in wanted if split in source.splits}
    fractions = dict(zip(SPLITS, scope.partition, strict=True))
    if abs(sum(scope.partition) - 1) > 1e-9:
        logger.info("--partition: the shares are divided by their sum, %g", sum(scope.partition))
    if "train" not in source.splits:
        raise UserError(f"--splits partition cuts the train split, and the source has only {', '.join(source.splits)}")
    parts = tuple(split for split in wanted if fractions[split] > 0)
    return {source.splits["train"]: parts} if parts else {}


def _select(
    source: Source, layout: Mapping[str, Sequence[str]], classes: Classes, scope: BuildScope, quotas: Quotas
) -> dict[str, _SplitState]:
    """Select images by quotas."""
    parts = scope.parts
    states: dict[str, _SplitState] = {}
    absent = [split for split in SPLITS if quotas.of(split) and split not in source.splits and parts is None]
    if absent:
        remedy = "name its file in --annotations, or cut it from train with --splits partition"
        logger.info("no %s split: the source has none: %s", " and no ".join(absent), remedy)
    for source_split, splits in layout.items():
        opened = _open(source, source_split, classes, scope.filters)
        candidates = opened.candidates()
        for split in splits:

            def eligible(image_ids: Sequence[str], split: str = split) -> tuple[str, ...]:
                return tuple(i for i in image_ids if parts is None or parts.split_of(i) == split)

            own = {
                category: Candidates(eligible(f.masked), () if scope.filters.require_mask else eligible(f.boxed))
                for category, f in candidates.items()
            }
            quota = quotas.of(split)
            chosen = set(select_images(own, quota, scope.seed))
            if quota is None:
                chosen.update(_backgrounds(split, eligible(opened.backgrounds()), keep=scope.keep_empty))
            states[split] = _SplitState(opened, own, quota, chosen)
    return states


def _backgrounds(split: str, images: Sequence[str], *, keep: bool) -> Sequence[str]:
    """Return the images without an object that are to be packed, of all of a split."""
    if images:
        found = f"{counted(len(images), 'image')} without an object of the requested classes"
        done = "packed as background" if keep else "left out (--keep-empty packs them as background)"
        logger.info("%s: %s: %s", split, found, done)
    return images if keep else ()


def _take_listed(
    source: Source, layout: Mapping[str, Sequence[str]], classes: Classes, scope: BuildScope, images: ImageList
) -> tuple[dict[str, _SplitState], tuple[Account, ...]]:
    """Select the listed images, and return accounts of those that the source does not have."""
    listed, parts = images.read(source.splits), scope.parts
    states: dict[str, _SplitState] = {}
    found: set[ListedImage] = set()
    for source_split, splits in layout.items():
        opened = _open(source, source_split, classes, scope.filters)
        here = [image for image in listed if image.split in ("", source_split)]
        ids = opened.find({image.name for image in here})
        found.update(image for image in here if image.name in ids)
        states |= {split: _SplitState(opened, {}, None, set()) for split in splits}
        for image_id in ids.values():
            states[splits[0] if parts is None else parts.split_of(image_id)].chosen.add(image_id)
    unknown = tuple(_unknown(image, layout) for image in listed if image not in found)
    if unknown:
        names = ", ".join(account.image_id for account in unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        logger.warning("%s: the source does not have %s: %s", images.url, counted(len(unknown), "image"), names)
    return states, unknown


def _open(source: Source, split: str, classes: Classes, filters: Filters) -> SourceSplit:
    logger.info("reading the annotations of %s", split)
    return source.open_split(split, classes, filters)


def _unknown(image: ListedImage, layout: Mapping[str, Sequence[str]]) -> Account:
    """Return the account of a listed image that was not found, in the first split that was searched."""
    split = layout.get(image.split, next(iter(layout.values())))[0]
    detail = f"in no table of {image.split or ', '.join(layout)}"
    if image.split and image.split not in layout:
        detail = f"{image.split} is not a split that is read"
    return Account("image", split, image.name, "", image.name, UNKNOWN, detail)


def _describe(
    layout: Mapping[str, Sequence[str]], states: Mapping[str, _SplitState], seed: int
) -> dict[str, list[PlannedImage]]:
    """Return a dict from splits of the dataset to their selected images, in seeded order."""
    planned: dict[str, list[PlannedImage]] = {}
    for splits in layout.values():
        chosen = {split: seeded_order(states[split].chosen, seed) for split in splits}
        # One call for all splits of a source split, because it reads whole tables.
        described = states[splits[0]].source.describe([image_id for ids in chosen.values() for image_id in ids])
        planned |= {split: [described[image_id] for image_id in ids] for split, ids in chosen.items()}
    return planned


def _report(
    planned: Mapping[str, Sequence[PlannedImage]],
    states: Mapping[str, _SplitState],
    classes: Classes,
    scope: BuildScope,
) -> tuple[ClassReport, ...]:
    reports: list[ClassReport] = []
    where = "at the source" if scope.partition is None else "in this part of the source"
    for split, of_split in planned.items():
        if isinstance(scope.images, ImageList):
            held = classes_held(of_split)
            reports += report_classes(split, classes.wanted, of_split, held, None) if of_split else []
        else:
            found = report_classes(split, classes.wanted, of_split, states[split].candidates, states[split].quota)
            reports += [explain_shortage(one, where, require_mask=scope.filters.require_mask) for one in found]
    return tuple(reports)


def _warn_of_other_formats(tasks: Sequence[ShardTask], scope: BuildScope) -> None:
    """Log the formats, by the names of the files, that are only packed as JPEGs: one line for each."""
    if scope.to_jpeg:
        return
    names: dict[str, list[str]] = {}
    for name in (image.file_name for task in tasks for image in task.images):
        names.setdefault(PurePosixPath(name).suffix.lower(), []).append(name)
    for suffix, found in names.items():
        if suffix in CONVERTED_ONLY:
            what = f"{counted(len(found), 'image')} named {suffix}, such as {found[0][:80]}"
            logger.warning("%s: shards hold JPEG and PNG; --to-jpeg 95 converts the others", what)


def _nothing_to_pack(classes: Classes, scope: BuildScope, unknown: int) -> UserError:
    if isinstance(scope.images, ImageList):
        return UserError(
            f"{scope.images.url}: the source has none of the listed images ({unknown}): check the list, --splits and "
            "--annotations"
        )
    names = ", ".join(category.name for category in classes.wanted[:10])
    what = "a mask" if scope.filters.require_mask else "a mask or a box"
    return UserError(
        f"no image of the requested splits has {what} of {names}: choose other classes or weaker filters, "
        "or check --annotations"
    )
