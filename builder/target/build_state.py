"""The state of a root: whose it is, what of it is finished, and how it becomes another's.

    <root>/.build.lock                who builds there now
           .build/plan.json           an unfinished build: the plan's fingerprint and the command
           .build/<task>.json         a finished task: its shard, index rows and accounts
           .build/retry/              the new files of a retry; complete once its dataset.json lies there

All of them are gone when a dataset is finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence

from builder.fetching.fetch import Refusal, Request, fetch
from builder.packing.pack import RECORDS, TaskResult, record_location
from builder.target.build_lock import LOCK_FILE
from builder.tasks.plan import ShardTask, task_fingerprint
from shards.common.errors import DatasetError, UserError
from shards.format.dataset import ACCOUNTS_FILE, DATASET_FILE, INDEX_FILE, README_FILE, SPLITS, Dataset, DatasetInfo
from shards.format.index_schema import IndexRow
from shards.format.sample import canonical_json
from shards.storage.explain import storage_errors
from shards.storage.location import Location
from shards.storage.retry import delete, retrying, write

PLAN_FILE = "plan.json"
RETRY = "retry"

_FILES = (DATASET_FILE, INDEX_FILE, ACCOUNTS_FILE, README_FILE)
_SHARD = r"\d{6}\.tar"


def claim(root: Location, fingerprint: str, command: str, *, overwrite: bool) -> bool:
    """Make `root` this plan's; False when it already holds the finished dataset of this plan. Needs the lock.

    Raises:
        UserError: `root` holds something of another plan, and `overwrite` is not set.
    """
    finish_retry(root)
    found, state, by = _occupant(root)
    if found == fingerprint and state == "finished":
        delete(root / RECORDS, recursive=True)  # left over when a build was killed at its very end
        if not overwrite:
            return False
    if found not in ("", fingerprint) and not overwrite:
        remedy = "choose another --out, or discard it with --overwrite"
        if state == "unfinished":
            remedy = f"finish it with its own command ({by}), {remedy}" if by else remedy
        raise UserError(
            f"{root}: holds a {state} dataset of another plan (its fingerprint is {found[:16]}, this command's is "
            f"{fingerprint[:16]}): {remedy}"
        )
    if found and (found != fingerprint or overwrite):
        _discard(root)
    if root.is_local:
        _remove_half_files(root)
    write(root / RECORDS / PLAN_FILE, canonical_json({"fingerprint": fingerprint, "command": command}))
    return True


def finished_results(root: Location, fingerprint: str, tasks: Sequence[ShardTask]) -> dict[str, TaskResult]:
    """Task name -> result, of those tasks whose record and whole shard lie in `root`."""
    records = sizes(root / RECORDS)
    tasks = [task for task in tasks if f"{task.name}.json" in records]
    if not tasks:
        return {}
    answers = fetch([Request(record_location(root, task)) for task in tasks])
    shards = {f"{split}/{name}": size for split in SPLITS for name, size in sizes(root / split).items()}
    results: dict[str, TaskResult] = {}
    for task, answer in zip(tasks, answers, strict=True):
        if isinstance(answer, Refusal):
            continue
        result = TaskResult.from_record(answer, task_fingerprint(fingerprint, task))
        if result is not None and (result.shard is None or shards.get(result.shard.path) == result.shard.nbytes):
            results[task.name] = result
    return results


def remove_strays(root: Location, shards: Collection[str]) -> None:
    """Remove shards that are not of the finished dataset.

    A task that is done again after a kill may have other failures than at first, and need other replacements; what was
    packed for it the first time must not be taken for a part of the dataset.
    """
    for split in SPLITS:
        for name in sizes(root / split):
            if re.fullmatch(_SHARD, name) and f"{split}/{name}" not in shards:
                delete(root / split / name)


def retry_stage(root: Location) -> Location:
    """Where a retry gathers its new files: a root of its own below the records."""
    return root / RECORDS / RETRY


def finish_retry(root: Location) -> bool:
    """Put the new files of a retry in place, if one was killed while it did so; whether there was one. Needs the lock.

    The dataset has no `dataset.json` meanwhile: it counts as unfinished until all of its files are new.
    """
    stage = retry_stage(root)
    if not retrying((stage / DATASET_FILE).exists):
        return False
    delete(root / DATASET_FILE)
    names = sizes(stage) | {f"{split}/{name}": size for split in SPLITS for name, size in sizes(stage / split).items()}
    for name in sorted(names, key=lambda name: name == DATASET_FILE):
        if name in _FILES or re.fullmatch(rf"({'|'.join(SPLITS)})/{_SHARD}", name):
            write(root / name, retrying((stage / name).read))
    delete(stage / DATASET_FILE)  # from here on there is nothing left to put in place
    delete(root / RECORDS, recursive=True)
    return True


def read_info(root: Location) -> DatasetInfo | None:
    """What `dataset.json` holds; None where there is none.

    Raises:
        DatasetError: damaged, or of another format.
    """
    [answer] = fetch([Request(root / DATASET_FILE)])
    if isinstance(answer, Refusal):
        return None
    try:
        return DatasetInfo.from_json(json.loads(answer), str(root / DATASET_FILE))
    except ValueError as error:
        raise DatasetError(f"{root / DATASET_FILE}: not JSON ({error}): choose another --out") from error


def read_rows(dataset: Dataset) -> list[IndexRow]:
    """The rows of the index."""
    lists = ("classes", "instances", "masks", "groups")
    return [IndexRow(**{**row, **{name: tuple(row[name]) for name in lists}}) for row in dataset.table.to_pylist()]


def sizes(folder: Location) -> dict[str, int]:
    """The files right in a folder: name -> bytes; none where there is no such folder."""

    def find() -> dict[str, dict]:
        with storage_errors(folder.url):
            found: dict[str, dict] = folder.fs.find(folder.path, maxdepth=1, detail=True)
            return found

    return {path.rsplit("/", 1)[-1]: int(entry["size"]) for path, entry in retrying(find).items()}


def _occupant(root: Location) -> tuple[str, str, str]:
    """The fingerprint of what lies in `root` ("" for nothing), whether it is finished, and its command if known."""
    info = read_info(root)
    if info is not None:
        return info.plan or "none", "finished", ""
    [answer] = fetch([Request(root / RECORDS / PLAN_FILE)])
    if isinstance(answer, Refusal):
        return "", "", ""
    try:
        value = json.loads(answer)
        return str(value["fingerprint"]), "unfinished", str(value["command"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root}: holds damaged files of a dataset ({error!r}): choose another --out") from error


def _discard(root: Location) -> None:
    """Remove a dataset or an unfinished build; nothing that is not of one is touched.

    The records go last: killed halfway, the root still holds an unfinished build, and no stray shard joins another.
    """
    write(root / RECORDS / PLAN_FILE, canonical_json({"fingerprint": "discarded", "command": ""}))
    for name in _FILES:
        delete(root / name)
    remove_strays(root, ())
    delete(root / RECORDS, recursive=True)


def _remove_half_files(root: Location) -> None:
    """Remove what `Location.write` leaves on a disk when it is killed: `<name>.<process>.<thread>.tmp`."""
    ours = "|".join([*map(re.escape, (*_FILES, LOCK_FILE)), _SHARD])
    for folder in (root, *(root / split for split in SPLITS)):
        for name in sizes(folder):
            if re.fullmatch(rf"({ours})\.\d+\.\d+\.tmp", name):
                delete(folder / name)
