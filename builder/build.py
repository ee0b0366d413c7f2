"""Runs a plan: on processes, resumable, to a finished dataset."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from builder.card import ClassCounts, count_classes, render_card
from builder.executors import IN_THIS_PROCESS, Engine, execute
from builder.fetch import Refusal, Request, fetch
from builder.openimages import OpenImages
from builder.pack import PACKED, RECORDS, Account, Job, TaskResult, pack_task, record_location
from builder.plan import Plan
from builder.prepare import Choice, ClassReport, prepare
from builder.progress import Progress
from shards.dataset import (
    ACCOUNTS_FILE,
    ACCOUNTS_SCHEMA,
    DATASET_FILE,
    INDEX_FILE,
    SPLITS,
    DatasetInfo,
    finish_dataset,
)
from shards.errors import StorageError, UserError
from shards.sample import canonical_json
from shards.storage import Location, storage_errors

README_FILE = "README.md"
PLAN_FILE = "plan.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """How a build ended.

    Attributes:
        already_built: the root held this very dataset before; nothing was done, and what follows is empty.
        chosen: what selection gave each class.
        counts: what was packed.
        failures: reason -> images and masks that were not packed.
        shards, samples, nbytes: of the whole dataset.
        resumed: shards that an earlier run had finished.
        fetched: bytes of images and masks read by this run.
        seconds: this run's.
    """

    already_built: bool
    chosen: tuple[ClassReport, ...] = ()
    counts: tuple[ClassCounts, ...] = ()
    failures: tuple[tuple[str, int], ...] = ()
    shards: int = 0
    samples: int = 0
    nbytes: int = 0
    resumed: int = 0
    fetched: int = 0
    seconds: float = 0.0


def build(
    source: OpenImages,
    choice: Choice,
    root: Location,
    *,
    engine: Engine = IN_THIS_PROCESS,
    overwrite: bool = False,
    command: str = "",
) -> Summary:
    """Build a dataset, or finish a build that was interrupted.

    The bytes of the result are a pure function of the sources and the choice; the engine and interruptions do not show.

    Args:
        source: where Open Images lies.
        choice: what to take from it.
        root: where the dataset goes.
        engine: where the shards are packed.
        overwrite: discard another dataset, or another unfinished build, in `root`.
        command: what the dataset card calls the command that made it.

    Raises:
        UserError: bad input, another dataset in `root`, or nothing that could be packed.
        StorageError: a place cannot be reached, read or written.
    """
    started = time.monotonic()
    if root.is_local:
        root = Location(os.path.abspath(root.path))  # workers may have another current folder
    _check_places(source, root)
    plan, chosen = prepare(source, choice)
    if not _claim(root, plan, command, overwrite=overwrite):
        return Summary(already_built=True, chosen=tuple(chosen))
    job = Job(root, source, plan.fingerprint)
    results = _finished_results(root, plan)
    resumed = len(results)
    if resumed:
        logger.info("resuming: %d of %d shards are already finished", resumed, len(plan.tasks))
    to_do = [task for task in plan.tasks if task.name not in results]
    fetched = 0
    with Progress(sum(len(task.images) for task in to_do)) as progress:
        for task, result in execute(partial(pack_task, job=job), to_do, engine):
            results[task.name] = result
            fetched += result.fetched
            progress.advance(len(task.images), result.fetched)
    info, counts, failures = _finish(root, plan, [results[task.name] for task in plan.tasks], source, choice, command)
    return Summary(
        already_built=False,
        chosen=tuple(chosen),
        counts=tuple(counts),
        failures=tuple(sorted(failures.items())),
        shards=len(info.shards),
        samples=sum(shard.samples for shard in info.shards),
        nbytes=sum(shard.nbytes for shard in info.shards),
        resumed=resumed,
        fetched=fetched,
        seconds=time.monotonic() - started,
    )


def _check_places(source: OpenImages, root: Location) -> None:
    """Fail now, not after gigabytes of tables, where images cannot be read or shards not be written."""
    if source.images.is_local and not os.path.isdir(source.images.path):
        raise StorageError(f"{source.images}: there is no such folder: check --images")
    # Whether this key exists does not matter: a missing bucket, endpoint or credential raises.
    fetch([Request(source.images / "train" / "0000000000000000.jpg")])
    if not root.is_local:
        probe = root / RECORDS / "probe"
        probe.write(b"can this be written?")
        probe.delete()
        return
    folder = os.path.abspath(root.path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise StorageError(f"{root}: cannot be written ({folder} is not a writable folder): choose another --out")


def _claim(root: Location, plan: Plan, command: str, *, overwrite: bool) -> bool:
    """Make `root` this plan's; False when it already holds the finished dataset of this plan.

    Raises:
        UserError: `root` holds something of another plan, and `overwrite` is not set.
    """
    found, state, by = _occupant(root)
    if found == plan.fingerprint and state == "finished":
        (root / RECORDS).delete(recursive=True)  # left over when a build was killed at its very end
        if not overwrite:
            return False
    if found not in ("", plan.fingerprint) and not overwrite:
        remedy = "choose another --out, or discard it with --overwrite"
        if state == "unfinished":
            remedy = f"finish it with its own command ({by}), {remedy}" if by else remedy
        raise UserError(
            f"{root}: holds a {state} dataset of another plan (its fingerprint is {found[:16]}, this command's is "
            f"{plan.fingerprint[:16]}): {remedy}"
        )
    if found and (found != plan.fingerprint or overwrite):
        _discard(root)
    if root.is_local:
        _remove_half_files(root)
    (root / RECORDS / PLAN_FILE).write(canonical_json({"fingerprint": plan.fingerprint, "command": command}))
    return True


def _occupant(root: Location) -> tuple[str, str, str]:
    """The fingerprint of what lies in `root` ("" for nothing), whether it is finished, and its command if known."""
    try:
        if (root / DATASET_FILE).exists():
            where = str(root / DATASET_FILE)
            return DatasetInfo.from_json(json.loads((root / DATASET_FILE).read()), where).plan or "none", "finished", ""
        if (root / RECORDS / PLAN_FILE).exists():
            value = json.loads((root / RECORDS / PLAN_FILE).read())
            return str(value["fingerprint"]), "unfinished", str(value["command"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root}: holds damaged files of a dataset ({error!r}): choose another --out") from error
    return "", "", ""


def _discard(root: Location) -> None:
    """Remove a dataset or an unfinished build; nothing that is not of one is touched.

    The records go last: killed halfway, the root still holds an unfinished build, and no stray shard joins another.
    """
    (root / RECORDS / PLAN_FILE).write(canonical_json({"fingerprint": "discarded", "command": ""}))
    for name in (DATASET_FILE, INDEX_FILE, ACCOUNTS_FILE, README_FILE):
        (root / name).delete()
    for split in SPLITS:
        for name in _sizes(root / split):
            if re.fullmatch(r"\d{6}\.tar", name):
                (root / split / name).delete()
    (root / RECORDS).delete(recursive=True)


def _remove_half_files(root: Location) -> None:
    """Remove what `Location.write` leaves on a disk when it is killed: `<name>.<process>.<thread>.tmp`."""
    ours = "|".join(map(re.escape, (DATASET_FILE, INDEX_FILE, ACCOUNTS_FILE, README_FILE)))
    for folder in (root, *(root / split for split in SPLITS)):
        for name in _sizes(folder):
            if re.fullmatch(rf"({ours}|\d{{6}}\.tar)\.\d+\.\d+\.tmp", name):
                (folder / name).delete()


def _finished_results(root: Location, plan: Plan) -> dict[str, TaskResult]:
    """Task name -> result, of the tasks whose record and whole shard lie in `root`."""
    records = _sizes(root / RECORDS)
    tasks = [task for task in plan.tasks if f"{task.name}.json" in records]
    answers = fetch([Request(record_location(root, task)) for task in tasks])
    sizes = {f"{split}/{name}": size for split in SPLITS for name, size in _sizes(root / split).items()}
    results: dict[str, TaskResult] = {}
    for task, answer in zip(tasks, answers, strict=True):
        if isinstance(answer, Refusal):
            continue
        result = TaskResult.from_record(answer, plan.fingerprint)
        if result is not None and (result.shard is None or sizes.get(result.shard.path) == result.shard.nbytes):
            results[task.name] = result
    return results


def _sizes(folder: Location) -> dict[str, int]:
    """The files right in a folder: name -> bytes; none where there is no such folder."""
    with storage_errors(folder.url):
        found = folder.fs.find(folder.path, maxdepth=1, detail=True)
    return {path.rsplit("/", 1)[-1]: int(entry["size"]) for path, entry in found.items()}


def _finish(
    root: Location, plan: Plan, results: Sequence[TaskResult], source: OpenImages, choice: Choice, command: str
) -> tuple[DatasetInfo, list[ClassCounts], Counter[str]]:
    """Write accounts, card, index and dataset.json, in this order, and remove the records."""
    rows = [row for result in results for row in result.rows]
    accounts = [account for result in results for account in result.accounts]
    failures = Counter(account.status for account in accounts if account.status != PACKED)
    if not rows:
        (root / RECORDS).delete(recursive=True)
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(failures.items()))
        raise UserError(f"none of the chosen images could be packed ({reasons}): check --images ({source.images})")
    counts = count_classes(rows, plan.categories)
    shards = [result.shard for result in results if result.shard is not None]
    (root / ACCOUNTS_FILE).write(_accounts_parquet(accounts))
    (root / README_FILE).write(render_card(plan.categories, counts, shards, command, failures).encode())
    origin = {
        "name": "Open Images",
        "images": source.images.url,
        "annotations": source.annotations.url,
        "choice": json.loads(canonical_json(asdict(choice))),
    }
    info = finish_dataset(root, rows, shards, plan.categories, plan=plan.fingerprint, source=origin)
    (root / RECORDS).delete(recursive=True)
    return info, counts, failures


def _accounts_parquet(accounts: Sequence[Account]) -> bytes:
    ordered = sorted(accounts, key=lambda a: (SPLITS.index(a.split), a.image_id, a.kind, a.source))
    columns = {name: [getattr(account, name) for account in ordered] for name in ACCOUNTS_SCHEMA.names}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=ACCOUNTS_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()
