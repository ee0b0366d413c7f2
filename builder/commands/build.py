"""Build a dataset: pack the shards of a plan, in rounds that replace failed images, and finish it."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from builder.commands.image_check import check_images
from builder.commands.progress import PackingProgress
from builder.fetching.fetch import Request, fetch
from builder.fetching.traffic import PROCESS, Traffic
from builder.packing.executors import IN_THIS_PROCESS, Engine, execute
from builder.packing.pack import RECORDS, Job, TaskResult, pack_task
from builder.planning.class_report import ClassReport
from builder.planning.image_list import ImageList
from builder.planning.plan_build import PlannedBuild
from builder.sources.base import Source
from builder.target.build_lock import BuildLock, refuse_if_held
from builder.target.build_state import check_shards, claim, finished_results, read_tables, remove_strays
from builder.target.card_picture import draw_card_picture
from builder.tasks.plan import ShardTask
from shards.common.errors import StorageError, UserError
from shards.common.redact import redact
from shards.common.text import counted
from shards.format.accounts import Account, failed_images, reasons, remarks
from shards.format.dataset import SPLITS, Category, DatasetInfo, open_dataset
from shards.format.dataset_card import ClassCounts, count_classes
from shards.format.dataset_writer import write_tables
from shards.format.index_schema import IndexRow
from shards.format.sample import canonical_json
from shards.storage.location import Location, check_writable
from shards.storage.retry import delete, retrying

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shortfall:
    """A class with fewer images than possible, because images failed and no replacements were left."""

    split: str
    name: str
    packed: int
    wanted: int


@dataclass(frozen=True)
class Summary:
    """Result of a build or a retry; traffic, `handled`, `resumed` and the durations in seconds are those of this run.

    Attributes:
        already_built: whether the root already held this dataset; then only `chosen`, `failures`, `shortfalls` are set.
        chosen: reports of the selection, per split and class.
        counts: packed images, masks and boxes per split and class.
        failures: pairs of a reason and the number of images and masks that were not packed for it.
        remarks: pairs of a remark and the number of packed images and masks that it is about.
        shortfalls: classes that failures left short; `("", "listed images", ...)` for a list of images.
        replaced: images that were fetched to replace failed ones.
        recovered: images and masks that `--retry-failed` recovered; None for a build.
        resumed: shards that an earlier run had finished.
        handled: images that were fetched, packed or not.
        tables: with zip directories.
    """

    already_built: bool
    chosen: tuple[ClassReport, ...] = ()
    counts: tuple[ClassCounts, ...] = ()
    failures: tuple[tuple[str, int], ...] = ()
    remarks: tuple[tuple[str, int], ...] = ()
    shortfalls: tuple[Shortfall, ...] = ()
    replaced: int = 0
    recovered: int | None = None
    shards: int = 0
    samples: int = 0
    nbytes: int = 0
    resumed: int = 0
    handled: int = 0
    tables: Traffic = Traffic()
    images: Traffic = Traffic()
    masks: Traffic = Traffic()
    seconds: float = 0.0
    packing: float = 0.0


@dataclass(frozen=True)
class PreparedBuild:
    """A build before its first write, and what making its plan took: read bytes, and seconds of a monotonic clock."""

    source: Source
    root: Location
    engine: Engine
    planned: PlannedBuild
    started: float
    packing_started: float
    tables: Traffic

    @property
    def job(self) -> Job:
        """What all tasks of the build share."""
        source, plan = self.source, self.planned.plan
        anonymous = source.images.anonymous, source.annotations.anonymous
        return Job(self.root, plan.fingerprint, *anonymous, self.planned.scope.to_jpeg)


def prepare_build(
    source: Source,
    root: Location,
    make_plan: Callable[[], PlannedBuild],
    *,
    engine: Engine = IN_THIS_PROCESS,
    writes: bool = True,
) -> PreparedBuild:
    """Check access to sources and root, then read the annotations and plan the build.

    Args:
        make_plan: `builder.planning.plan_build.plan_build` with its arguments.
        engine: where shards are going to be packed.
        writes: whether the command writes to `root`.

    Raises:
        UserError: bad input, or another build is at work in `root`.
        StorageError: a location cannot be reached, read or written.
    """
    started, before = time.monotonic(), PROCESS.total
    if root.is_local:
        root = Location(os.path.abspath(root.path))  # workers may have another current folder
    engine.warm_up(partial(_reach, source.image_roots))
    _check_places(source, root, writes)
    refuse_if_held(root)
    planned = make_plan()
    return PreparedBuild(source, root, engine, planned, started, time.monotonic(), PROCESS.total - before)


def build(prepared: PreparedBuild, *, overwrite: bool = False, command: str = "") -> Summary:
    """Build a dataset, or finish a build that was interrupted; engine and interruptions do not change its bytes.

    Args:
        overwrite: discard another dataset or unfinished build in the root.
        command: the command to record in the dataset card.

    Raises:
        UserError: another dataset or another running build in the root, shards that were packed are gone from it, or no
            image could be packed.
        StorageError: a location cannot be reached, read or written.
    """
    source, root, planned = prepared.source, prepared.root, prepared.planned
    plan = planned.plan
    with BuildLock(root) as lock:
        confirm = partial(_check_images, prepared)
        if not claim(root, plan.fingerprint, redact(command), overwrite=overwrite, confirm=confirm):
            dataset = open_dataset(root)
            check_shards(root, dataset.info.shards, "Build the dataset again, with --overwrite")
            rows, accounts = read_tables(dataset)
            return Summary(
                already_built=True,
                chosen=planned.reports,
                failures=tuple(reasons(accounts).items()),
                shortfalls=tuple(shortfalls(planned, rows, accounts, dataset.categories)),
            )
        tasks, by_name, resumed = _run(planned, prepared.job, prepared.engine, lock)
        results = [by_name[task.name] for task in tasks]
        rows = [row for result in results for row in result.rows]
        shards = [result.shard for result in results if result.shard is not None]
        accounts = [*planned.unknown, *(account for result in results for account in result.accounts)]
        if not rows:
            delete(root / RECORDS, recursive=True)
            raise _nothing_packed(source, plan.tasks[0].images[0].url, accounts)
        _warn_of_empty_splits(prepared, rows)
        lock.check()
        remove_strays(root, {shard.path for shard in shards})
        check_shards(root, shards, "Run the same command again: it packs what is missing")
        origin = {**source.origin(), "choice": json.loads(canonical_json(planned.scope.recorded()))}
        card = draw_card_picture(rows, plan.categories, lambda path: root / path)
        info = write_tables(
            root, rows, shards, plan.categories, accounts, card, plan=plan.fingerprint, source=origin, command=command
        )
        delete(root / RECORDS, recursive=True)
    return summarise(
        prepared,
        info,
        rows,
        accounts,
        results,
        replaced=sum(len(task.images) for task in tasks[len(plan.tasks) :]),
        resumed=len(resumed),
        handled=sum(len(task.images) for task in tasks if task.name not in resumed),
    )


def summarise(
    prepared: PreparedBuild,
    info: DatasetInfo,
    rows: Sequence[IndexRow],
    accounts: Sequence[Account],
    results: Collection[TaskResult],
    *,
    handled: int,
    replaced: int = 0,
    recovered: int | None = None,
    resumed: int = 0,
) -> Summary:
    """Return the `Summary` of a finished dataset and of what this run fetched; the keywords are fields of it."""
    planned, now = prepared.planned, time.monotonic()
    return Summary(
        already_built=False,
        chosen=planned.reports,
        counts=tuple(count_classes(rows, planned.plan.categories)),
        failures=tuple(reasons(accounts).items()),
        remarks=tuple(remarks(accounts).items()),
        shortfalls=tuple(shortfalls(planned, rows, accounts, info.categories)),
        shards=len(info.shards),
        samples=sum(shard.samples for shard in info.shards),
        nbytes=sum(shard.nbytes for shard in info.shards),
        tables=prepared.tables,
        images=sum((result.images for result in results), Traffic()),
        masks=sum((result.masks for result in results), Traffic()),
        seconds=now - prepared.started,
        packing=now - prepared.packing_started,
        handled=handled,
        replaced=replaced,
        recovered=recovered,
        resumed=resumed,
    )


def shortfalls(
    planned: PlannedBuild, rows: Iterable[IndexRow], accounts: Iterable[Account], categories: Iterable[Category]
) -> list[Shortfall]:
    """Return the classes with fewer images than requested and than the source has, because images failed."""
    if isinstance(planned.scope.images, ImageList):
        images = [account for account in accounts if account.kind == "image"]
        failed = sum(account.failed for account in images)
        return [Shortfall("", "listed images", len(images) - failed, len(images))] if failed else []
    ids = {category.name: category.id for category in categories}
    packed = Counter(
        (row.split, category)
        for row in rows
        for category, masks in zip(row.classes, row.masks, strict=True)
        if masks or not planned.scope.filters.require_mask
    )
    found = [
        Shortfall(one.split, one.name, packed[one.split, ids[one.name]], min(one.asked, one.available))
        for one in planned.reports
    ]
    return [short for short in found if short.packed < short.wanted]


def _check_places(source: Source, root: Location, writes: bool) -> None:
    """Check access to the images and the root before gigabytes of tables are read."""
    for root_of_images in source.image_roots:
        if root_of_images.is_local and not os.path.isdir(root_of_images.path):
            raise StorageError(f"{root_of_images}: there is no such folder: check --images")
    _reach(source.image_roots)
    if writes:
        retrying(lambda: check_writable(root, "--out", f"{RECORDS}/probe"))


def _reach(roots: Sequence[Location]) -> None:
    """Connect to the roots of the images; StorageError without a bucket, endpoint or credential."""
    fetch([Request(each / "train" / "0000000000000000.jpg") for each in roots])  # a key that need not exist


def _check_images(prepared: PreparedBuild, resuming: bool) -> None:
    """Raise a UserError if the images are not where they should be; splits of which some were packed are not checked.

    Without the check, a build whose root of images is wrong would try all that the source lists.
    """
    planned, job = prepared.planned, prepared.job
    finished = finished_results(job.root, job.fingerprint, planned.plan.tasks) if resuming else {}
    check_images(prepared.source, planned, packed={row.split for one in finished.values() for row in one.rows})


def _nothing_packed(source: Source, url: str, accounts: Sequence[Account]) -> UserError:
    details = {account.status: account.detail for account in reversed(accounts) if account.kind == "image"}
    found = ", ".join(
        f"{reason} {count}" + (f": {details[reason]}" if details.get(reason) else "")
        for reason, count in reasons(accounts).items()
    )
    return UserError(
        f"none of the chosen images could be packed ({found}), such as {url}: check --images ({source.images}): the "
        f"images must be at {source.image_layout}"
    )


def _warn_of_empty_splits(prepared: PreparedBuild, rows: Sequence[IndexRow]) -> None:
    packed = {row.split for row in rows}
    first = {task.split: task.images[0].url for task in prepared.planned.plan.tasks if task.split not in packed}
    for split, url in first.items():
        layout = prepared.source.image_layout
        logger.warning("no image of %s could be packed, such as %s: the images must be at %s", split, url, layout)


def _run(
    planned: PlannedBuild, job: Job, engine: Engine, lock: BuildLock
) -> tuple[list[ShardTask], dict[str, TaskResult], set[str]]:
    """Pack all rounds; return tasks, results by the task's name, and names of tasks that an earlier run finished."""
    tasks: list[ShardTask] = []
    results: dict[str, TaskResult] = {}
    resumed: set[str] = set()
    fresh: Sequence[ShardTask] = planned.plan.tasks
    with PackingProgress() as progress:
        while fresh:
            finished = finished_results(job.root, job.fingerprint, fresh)
            if finished:
                logger.info("resuming: %d of %s already finished", len(finished), counted(len(fresh), "shard"))
            resumed |= finished.keys()
            results |= finished
            to_do = [task for task in fresh if task.name not in finished]
            progress.expect(sum(len(task.images) for task in to_do))
            for task, result in execute(partial(pack_task, job=job), to_do, engine):
                lock.check()
                results[task.name] = result
                failed = len(failed_images(result.accounts, task.split))
                progress.add(len(task.images), result.images.nbytes + result.masks.nbytes, failed)
            tasks += fresh
            accounts = [account for result in results.values() for account in result.accounts]
            failures = {split: failed_images(accounts, split) for split in SPLITS}
            fresh = planned.next_round(tasks, failures)
            if fresh:
                count = sum(len(task.images) for task in fresh)
                lost = sum(map(len, failures.values()))
                logger.info("%s failed: trying %s", counted(lost, "image"), counted(count, "replacement"))
    return tasks, results, resumed
