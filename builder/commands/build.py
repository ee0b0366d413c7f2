"""Build a dataset: pack the shards of a plan, in rounds that replace failed images, and finish it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from builder.commands.progress import Progress
from builder.fetching.fetch import Request, fetch
from builder.fetching.traffic import PROCESS, Traffic
from builder.packing.executors import IN_THIS_PROCESS, Engine, execute, warm_up
from builder.packing.pack import RECORDS, Job, TaskResult, pack_task
from builder.planning.class_report import ClassReport
from builder.planning.prepare import Preparation
from builder.planning.replacements import next_round
from builder.sources.base import Source
from builder.target.build_lock import BuildLock, refuse_if_held
from builder.target.build_state import claim, finished_results, read_rows, remove_strays
from builder.tasks.plan import ShardTask
from shards.common.errors import StorageError, UserError
from shards.common.redact import redact
from shards.common.text import counted
from shards.format.accounts import Account, failed_images, read_accounts, reasons
from shards.format.dataset import (
    ACCOUNTS_FILE,
    SPLITS,
    Category,
    DatasetInfo,
    open_dataset,
)
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
    """Result of a build or a retry.

    Attributes:
        already_built: whether the root already held this dataset, so that nothing was done. Only `chosen` and
            `shortfalls` are set then.
        chosen: reports of the selection, per split and class.
        counts: packed images, masks and boxes per split and class.
        failures: pairs of a reason and the number of images and masks that were not packed for it.
        shortfalls: classes that failures left short; `("", "listed images", ...)` for a list of images.
        replaced: images that were fetched to replace failed ones.
        recovered: images and masks that `--retry-failed` recovered; None for a build.
        shards: number of shards of the dataset.
        samples: number of samples of the dataset.
        nbytes: size of the shards, in bytes.
        resumed: shards that an earlier run had finished.
        handled: images that this run fetched, packed or not.
        tables: traffic of this run for tables and zip directories.
        images: traffic of this run for images.
        masks: traffic of this run for masks.
        seconds: duration of this run.
        packing: duration of the packing in this run, in seconds.
    """

    already_built: bool
    chosen: tuple[ClassReport, ...] = ()
    counts: tuple[ClassCounts, ...] = ()
    failures: tuple[tuple[str, int], ...] = ()
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
    """A build before its first write: where it reads and writes, its plan, and what making the plan took.

    Attributes:
        started, prepared: seconds of the monotonic clock.
        tables: what was read to make the plan.
    """

    source: Source
    root: Location
    engine: Engine
    preparation: Preparation
    started: float
    prepared: float
    tables: Traffic

    def measured(self) -> dict[str, Any]:
        """Return the fields of a `Summary` that measure time and tables, as of now."""
        now = time.monotonic()
        return {"tables": self.tables, "seconds": now - self.started, "packing": now - self.prepared}


@dataclass(frozen=True)
class Outcome:
    """Tasks and results of all rounds of a build, and the traffic of this run."""

    tasks: tuple[ShardTask, ...]
    results: tuple[TaskResult, ...]
    resumed: int
    handled: int
    images: Traffic
    masks: Traffic


def begin(
    source: Source,
    root: Location,
    make_plan: Callable[[], Preparation],
    *,
    engine: Engine = IN_THIS_PROCESS,
    writes: bool = True,
) -> PreparedBuild:
    """Check the places, then read the annotations and plan the build.

    Args:
        source: images and annotations.
        root: root of the dataset.
        make_plan: `builder.planning.prepare.prepare` with its arguments; called once the places are known to be usable.
        engine: where shards are going to be packed.
        writes: whether the command writes to `root`, so that writing has to be possible.

    Raises:
        UserError: bad input, or another build is at work in `root`.
        StorageError: a place cannot be reached, read or written.
    """
    started, before = time.monotonic(), PROCESS.total
    root = absolute(root)
    check_places(source, root, write_to=writes)
    warm_up(engine)
    refuse_if_held(root)
    preparation = make_plan()
    return PreparedBuild(source, root, engine, preparation, started, time.monotonic(), PROCESS.total - before)


def build(begun: PreparedBuild, *, overwrite: bool = False, command: str = "") -> Summary:
    """Build a dataset, or finish a build that was interrupted.

    The bytes of the result are a pure function of sources and plan; the engine and interruptions do not change them.

    Args:
        begun: a build as `begin` returns it.
        overwrite: discard another dataset, or another unfinished build, in the root.
        command: the command to record in the dataset card.

    Raises:
        UserError: another dataset or another running build in the root, or no image could be packed.
        StorageError: a place cannot be reached, read or written.
    """
    source, root, preparation = begun.source, begun.root, begun.preparation
    plan = preparation.plan
    with BuildLock(root) as lock:
        if not claim(root, plan.fingerprint, redact(command), overwrite=overwrite):
            return _already_built(root, preparation)
        job = Job(root, plan.fingerprint, source.images.anonymous, source.annotations.anonymous)
        done = _run(preparation, job, begun.engine, lock)
        rows = [row for result in done.results for row in result.rows]
        shards = [result.shard for result in done.results if result.shard is not None]
        accounts = [*preparation.unknown, *(account for result in done.results for account in result.accounts)]
        if not rows:
            delete(root / RECORDS, recursive=True)
            found = ", ".join(f"{reason} {count}" for reason, count in reasons(accounts).items())
            raise UserError(f"none of the chosen images could be packed ({found}): check --images ({source.images})")
        lock.check()
        remove_strays(root, {shard.path for shard in shards})
        origin = {**source.origin(), "choice": json.loads(canonical_json(preparation.options))}
        info = write_tables(
            root, rows, shards, plan.categories, accounts, plan=plan.fingerprint, source=origin, command=command
        )
        delete(root / RECORDS, recursive=True)
    first = {task.name for task in plan.tasks}
    return summarise(
        preparation,
        info,
        rows,
        accounts,
        replaced=sum(len(task.images) for task in done.tasks if task.name not in first),
        resumed=done.resumed,
        handled=done.handled,
        images=done.images,
        masks=done.masks,
        **begun.measured(),
    )


def _already_built(root: Location, preparation: Preparation) -> Summary:
    dataset = open_dataset(root)
    accounts = read_accounts(retrying((root / ACCOUNTS_FILE).read), str(root / ACCOUNTS_FILE))
    short = shortfalls(preparation, read_rows(dataset), dataset.categories, accounts)
    return Summary(already_built=True, chosen=preparation.reports, shortfalls=tuple(short))


def summarise(
    preparation: Preparation,
    info: DatasetInfo,
    rows: Sequence[IndexRow],
    accounts: Sequence[Account],
    **measured: Any,
) -> Summary:
    """Return the `Summary` of a finished dataset; `measured` are the fields that describe this run."""
    counts = count_classes(rows, preparation.plan.categories)
    return Summary(
        already_built=False,
        chosen=preparation.reports,
        counts=tuple(counts),
        failures=tuple(reasons(accounts).items()),
        shortfalls=tuple(shortfalls(preparation, rows, info.categories, accounts)),
        shards=len(info.shards),
        samples=sum(shard.samples for shard in info.shards),
        nbytes=sum(shard.nbytes for shard in info.shards),
        **measured,
    )


def shortfalls(
    preparation: Preparation,
    rows: Sequence[IndexRow],
    categories: Sequence[Category],
    accounts: Sequence[Account],
) -> list[Shortfall]:
    """Return the classes with fewer images than requested and than the source has, because images failed."""
    if preparation.listed:
        images = [account for account in accounts if account.kind == "image"]
        failed = sum(account.failed for account in images)
        return [Shortfall("", "listed images", len(images) - failed, len(images))] if failed else []
    ids = {category.name: category.id for category in categories}
    packed: dict[tuple[str, int], int] = {}
    for row in rows:
        for category, masks in zip(row.classes, row.masks, strict=True):
            if masks or not preparation.require_mask:
                packed[row.split, category] = packed.get((row.split, category), 0) + 1
    found = []
    for report in preparation.reports:
        wanted, got = min(report.asked, report.available), packed.get((report.split, ids[report.name]), 0)
        if got < wanted:
            found.append(Shortfall(report.split, report.name, got, wanted))
    return found


def absolute(root: Location) -> Location:
    """Return the root with an absolute path, because workers may have another current folder."""
    return Location(os.path.abspath(root.path)) if root.is_local else root


def check_places(source: Source, root: Location, *, write_to: bool = True) -> None:
    """Check access to the images and the root before gigabytes of tables are read.

    Raises:
        StorageError: images cannot be read, or `root` cannot be written.
    """
    if source.images.is_local and not os.path.isdir(source.images.path):
        raise StorageError(f"{source.images}: there is no such folder: check --images")
    # This key need not exist: a missing bucket, endpoint or credential raises.
    fetch([Request(source.images / "train" / "0000000000000000.jpg")])
    if write_to:
        retrying(lambda: check_writable(root, "--out", f"{RECORDS}/probe"))


def _run(preparation: Preparation, job: Job, engine: Engine, lock: BuildLock) -> Outcome:
    """Pack all rounds, except shards that an earlier run finished."""
    tasks: list[ShardTask] = []
    results: dict[str, TaskResult] = {}
    resumed = handled = 0
    images = masks = Traffic()
    fresh: Sequence[ShardTask] = preparation.plan.tasks
    with Progress() as progress:
        while fresh:
            finished = finished_results(job.root, job.fingerprint, fresh)
            if finished:
                logger.info("resuming: %d of %s already finished", len(finished), counted(len(fresh), "shard"))
            resumed += len(finished)
            results |= finished
            to_do = [task for task in fresh if task.name not in finished]
            progress.expect(sum(len(task.images) for task in to_do))
            for task, result in execute(partial(pack_task, job=job), to_do, engine):
                lock.check()
                results[task.name] = result
                handled += len(task.images)
                images, masks = images + result.images, masks + result.masks
                failed = len(failed_images(result.accounts, task.split))
                progress.advance(len(task.images), result.images.nbytes + result.masks.nbytes, failed)
            tasks += fresh
            accounts = [account for result in results.values() for account in result.accounts]
            failures = {split: failed_images(accounts, split) for split in SPLITS}
            fresh = next_round(preparation.replacements, tasks, failures.__getitem__, preparation.images_per_shard)
            if fresh:
                count = sum(len(task.images) for task in fresh)
                lost = sum(map(len, failures.values()))
                logger.info("%s failed: trying %s", counted(lost, "image"), counted(count, "replacement"))
    return Outcome(tuple(tasks), tuple(results[task.name] for task in tasks), resumed, handled, images, masks)
