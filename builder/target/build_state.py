"""The state of a root: which plan it belongs to, which tasks are finished, and how it is discarded for another plan.

    <root>/.build.lock                the running build
           .build/plan.json           an unfinished build: the plan's fingerprint and the command
           .build/<task>.json         a finished task: its shard, index rows and accounts
           .build/retry/              the new files of a retry; complete once it contains a dataset.json

A finished dataset has none of them.
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from builder.fetching.fetch import Refusal, Request, fetch
from builder.packing.pack import RECORDS, TaskResult, record_location
from builder.target.build_lock import LOCK_FILE
from builder.tasks.plan import ShardTask, task_fingerprint
from shards.common.errors import UserError
from shards.common.text import counted
from shards.format.accounts import Account, read_accounts
from shards.format.dataset import ACCOUNTS_FILE, DATASET_FILE, INDEX_FILE, SPLITS, Dataset, DatasetInfo, Shard
from shards.format.dataset_card import PICTURE_FILE, README_FILE
from shards.format.index_schema import IndexRow
from shards.format.sample import canonical_json
from shards.storage.explain import storage_errors
from shards.storage.location import Location
from shards.storage.retry import delete, retrying, write

PLAN_FILE = "plan.json"
RETRY = "retry"

_FILES = (DATASET_FILE, INDEX_FILE, ACCOUNTS_FILE, README_FILE, PICTURE_FILE)
_SHARD_PATH = rf"(?:{'|'.join(SPLITS)})/\d{{6}}\.tar"


@dataclass(frozen=True)
class _Occupant:
    """A dataset or an unfinished build in a root: fingerprint of its plan, and its command if known."""

    fingerprint: str
    finished: bool
    command: str = ""


def claim(
    root: Location, fingerprint: str, command: str, *, overwrite: bool, confirm: Callable[[bool], None] = lambda _: None
) -> bool:
    """Mark a locked root as being built by a plan; False if it already contains the finished dataset of this plan.

    Unless it does, `confirm` is called before anything is discarded or written, with whether an unfinished build of
    this plan is resumed; its exception leaves the root as it is. UserError if the root contains something of another
    plan, and `overwrite` is not set.
    """
    finish_retry(root)
    found = _occupant(root)
    same = found is not None and found.fingerprint == fingerprint
    if found is not None and found.finished and same:
        delete(root / RECORDS, recursive=True)  # left over from a build that was killed at its very end
        if not overwrite:
            return False
    if found is not None and not same and not overwrite:
        remedy = "choose another --out, or discard it with --overwrite"
        if found.command:
            remedy = f"finish it with its own command ({found.command}), {remedy}"
        raise UserError(
            f"{root}: contains {'a finished' if found.finished else 'an unfinished'} dataset of another plan (its "
            f"fingerprint is {found.fingerprint[:16]}, this command's is {fingerprint[:16]}): {remedy}"
        )
    discard = found is not None and (overwrite or not same)
    confirm(found is not None and not discard)
    if discard:
        _discard(root)
    if root.is_local:
        _remove_partial_files(root)
    write(root / RECORDS / PLAN_FILE, canonical_json({"fingerprint": fingerprint, "command": command}))
    return True


def finished_results(root: Location, fingerprint: str, tasks: Sequence[ShardTask]) -> dict[str, TaskResult]:
    """Return results by task name, for tasks of which the root contains both the record and the whole shard."""
    records = _sizes(root / RECORDS)
    tasks = [task for task in tasks if f"{task.name}.json" in records]
    if not tasks:
        return {}
    answers = fetch([Request(record_location(root, task)) for task in tasks])
    shards = _split_sizes(root)
    results: dict[str, TaskResult] = {}
    for task, answer in zip(tasks, answers, strict=True):
        if isinstance(answer, Refusal):
            continue
        result = TaskResult.from_record(answer, task_fingerprint(fingerprint, task))
        if result is not None and (result.shard is None or shards.get(result.shard.path) == result.shard.nbytes):
            results[task.name] = result
    return results


def check_shards(root: Location, shards: Collection[Shard], remedy: str) -> None:
    """Raise a UserError, with the remedy, unless the root has all of these shards in their full length."""
    sizes = _split_sizes(root)
    if lost := [shard.path for shard in shards if sizes.get(shard.path) != shard.nbytes]:
        raise UserError(
            f"{root}: {len(lost)} of {counted(len(shards), 'written shard')} gone or of another size, such as "
            f"{lost[0]}: does something else write or delete there? {remedy}"
        )


def remove_strays(root: Location, shards: Collection[str]) -> None:
    """Remove shards that are not in the dataset: a task that is packed again may need fewer replacements."""
    for path in _split_sizes(root):
        if re.fullmatch(_SHARD_PATH, path) and path not in shards:
            delete(root / path)


def retry_stage(root: Location) -> Location:
    """Return the location where a retry collects its new files, with the layout of a root."""
    return root / RECORDS / RETRY


def finish_retry(root: Location) -> bool:
    """Move the new files of a retry into place, and return whether there were any. The caller holds the lock.

    Meanwhile the root has no `dataset.json` and counts as unfinished. The next call completes a move that is killed.
    """
    stage = retry_stage(root)
    if not retrying((stage / DATASET_FILE).exists):
        return False
    delete(root / DATASET_FILE)
    for name in sorted(_sizes(stage) | _split_sizes(stage), key=lambda name: name == DATASET_FILE):  # dataset.json last
        if name in _FILES or re.fullmatch(_SHARD_PATH, name):
            write(root / name, retrying((stage / name).read))
    delete(stage / DATASET_FILE)  # from here on nothing is left to move
    delete(root / RECORDS, recursive=True)
    return True


def read_tables(dataset: Dataset) -> tuple[list[IndexRow], list[Account]]:
    """Return the rows of the index, and the accounts."""
    location = dataset.root / ACCOUNTS_FILE
    rows = [IndexRow.from_values(values) for values in dataset.table.to_pylist()]
    return rows, read_accounts(retrying(location.read), str(location))


def _sizes(folder: Location) -> dict[str, int]:
    """Return the sizes in bytes of the files directly in a folder, by name; the folder may be missing."""

    def find() -> dict[str, dict]:
        with storage_errors(folder.url):
            found: dict[str, dict] = folder.fs.find(folder.path, maxdepth=1, detail=True)
            return found

    depth = folder.path.rstrip("/").count("/") + 1  # adlfs returns files of deeper folders as well
    entries = [(path, entry) for path, entry in retrying(find).items() if path.count("/") == depth]
    return {path.rpartition("/")[2]: int(entry["size"]) for path, entry in entries}


def _split_sizes(root: Location) -> dict[str, int]:
    """Return the sizes in bytes of the files in the folders of the splits, by path under the root."""
    return {f"{split}/{name}": size for split in SPLITS for name, size in _sizes(root / split).items()}


def _occupant(root: Location) -> _Occupant | None:
    dataset, plan = fetch([Request(root / DATASET_FILE), Request(root / RECORDS / PLAN_FILE)])
    try:
        if not isinstance(dataset, Refusal):
            info = DatasetInfo.from_json(json.loads(dataset), str(root / DATASET_FILE))
            return _Occupant(info.plan or "none", finished=True)
        if not isinstance(plan, Refusal):
            value = json.loads(plan)
            return _Occupant(str(value["fingerprint"]), finished=False, command=str(value["command"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{root}: contains damaged files of a dataset ({error!r}): choose another --out") from error
    return None


def _discard(root: Location) -> None:
    """Remove a dataset or an unfinished build, and no other files.

    The records are removed last: killed halfway, the root still contains an unfinished build, and no shard is left over
    for another one.
    """
    write(root / RECORDS / PLAN_FILE, canonical_json({"fingerprint": "discarded", "command": ""}))
    for name in _FILES:
        delete(root / name)
    remove_strays(root, ())
    delete(root / RECORDS, recursive=True)


def _remove_partial_files(root: Location) -> None:
    """Remove what a killed `Location.write` leaves on a disk: `<name>.<process>.<thread>.tmp`."""
    names = "|".join([*map(re.escape, (*_FILES, LOCK_FILE)), _SHARD_PATH])
    for path in {**_sizes(root), **_split_sizes(root)}:
        if re.fullmatch(rf"({names})\.\d+\.\d+\.tmp", path):
            delete(root / path)
