"""`--retry-failed`: fetch again what failed in a finished dataset, and rewrite the affected shards only.

The new files are written to a separate folder, the new `dataset.json` last, and then replace the old files
(`builder.target.build_state.finish_retry`). A retry killed before that leaves the old dataset; one killed during the
replacement is completed by the next command.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from builder.commands.build import PreparedBuild, Summary, summarise
from builder.commands.progress import PackingProgress
from builder.fetching.fetch import Request, fetch_one
from builder.fetching.traffic import Meter
from builder.packing.executors import Engine, execute
from builder.packing.pack import RECORDS, Job, TaskResult, pack_image, pack_images, read_masks
from builder.planning.plan_build import PlannedBuild
from builder.target.build_lock import BuildLock
from builder.target.build_state import check_shards, finish_retry, read_tables, retry_stage
from builder.target.card_picture import draw_card_picture
from builder.tasks.plan import InlineMask, Member, PlannedImage, ShardTask
from shards.common.errors import DatasetError, UserError
from shards.format.accounts import PACKED, RECOVERED, UNKNOWN, Account, failed_images
from shards.format.dataset import SPLITS, Dataset, Shard, open_dataset
from shards.format.dataset_writer import write_tables
from shards.format.index_schema import IndexRow
from shards.format.sample import Sample
from shards.format.shard_tar import pack_shard, parse_members
from shards.storage.location import Location
from shards.storage.retry import delete, write

logger = logging.getLogger(__name__)

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Repair:
    """A task of the build in which something failed, with its shard (None if it has none), index rows and accounts."""

    task: ShardTask
    shard: Shard | None
    rows: tuple[IndexRow, ...]
    accounts: tuple[Account, ...]


def retry_failed(prepared: PreparedBuild, *, command: str = "") -> Summary:
    """Fetch again what failed in a finished dataset of this plan; `command` is recorded in its card."""
    root, planned = prepared.root, prepared.planned
    with BuildLock(root) as lock:
        finish_retry(root)
        dataset = open_dataset(root)
        info = dataset.info
        if info.plan != planned.plan.fingerprint:
            raise UserError(
                f"{root}: holds a dataset of another plan: --retry-failed needs the command that built it, and "
                "unchanged annotations and zips (otherwise build again, with --overwrite or another --out)"
            )
        check_shards(root, info.shards, "Build the dataset again, with --overwrite")
        rows, accounts = read_tables(dataset)
        repairs = _repairs(planned, dataset, rows, accounts)
        stage = retry_stage(root)
        delete(stage, recursive=True)
        results = _run(repairs, prepared.job, prepared.engine, lock)
        recovered = sum(_recovered(repair.accounts, results[repair.task.name].accounts) for repair in repairs)
        if recovered:
            fresh = [results[repair.task.name] for repair in repairs]
            paths = {repair.task.path for repair in repairs}
            keys = {(account.split, account.key) for repair in repairs for account in repair.accounts}
            rows = [row for row in rows if row.shard not in paths]
            rows += [row for result in fresh for row in result.rows]
            shards = [shard for shard in info.shards if shard.path not in paths]
            shards += [result.shard for result in fresh if result.shard is not None]
            accounts = [account for account in accounts if (account.split, account.key) not in keys]
            accounts += [account for result in fresh for account in result.accounts]
            lock.check()
            staged = {one.shard.path for one in fresh if one.shard is not None and one.shard not in info.shards}
            classes, origin = dataset.categories, info.source
            picture = draw_card_picture(rows, classes, lambda path: (stage if path in staged else root) / path)
            info = write_tables(
                stage, rows, shards, classes, accounts, picture, plan=info.plan, source=origin, command=command
            )
            finish_retry(root)
        else:
            delete(root / RECORDS, recursive=True)
    handled = sum(len(failed_images(repair.accounts, repair.task.split)) for repair in repairs)
    return summarise(prepared, info, rows, accounts, results.values(), recovered=recovered, handled=handled)


def repair_task(repair: Repair, job: Job) -> TaskResult:
    """Fetch again what failed in a task, and stage its new shard if anything succeeds; accounts keep their order.

    Packed images and masks come from the old shard, byte for byte; DatasetError if it does not match the dataset.
    """
    task, images, masks = repair.task, Meter(), Meter()
    old = {account.key: account for account in repair.accounts}
    lost = failed_images(repair.accounts, task.split)
    outcomes = dict(zip(sorted(lost), pack_images(_by_id(task, lost), task.split, job, images, masks), strict=True))
    samples = _old_samples(repair, job.root)
    maskless = {a.image_id for a in repair.accounts if a.kind == "mask" and a.failed and a.image_id in samples}
    known = [_known_masks(image, samples[image.image_id], old) for image in _by_id(task, maskless)]
    contents = read_masks(known, job, masks, spare_per_image=0)
    for image in known:
        outcomes[image.image_id] = pack_image(image, samples[image.image_id].image, contents, task.split)
    new = {account.key: _merged(old[account.key], account) for _, found in outcomes.values() for account in found}
    accounts = tuple(new.get(account.key, account) for account in repair.accounts)
    if not _recovered(repair.accounts, accounts):
        return TaskResult(repair.shard, repair.rows, accounts, images.total, masks.total)
    for image_id, (sample, _) in outcomes.items():
        if sample is not None:
            samples[image_id] = sample
    ordered = [samples[image.image_id] for image in task.images if image.image_id in samples]
    packed = pack_shard(ordered, split=task.split, path=task.path)
    _check_untouched(repair, packed.rows, outcomes)
    write(retry_stage(job.root) / task.path, packed.data)
    return TaskResult(packed.shard, packed.rows, accounts, images.total, masks.total)


def _recovered(before: Sequence[Account], after: Sequence[Account]) -> int:
    return sum(new.status == PACKED and old.failed for old, new in zip(before, after, strict=True))


def _by_id(task: ShardTask, image_ids: set[str]) -> list[PlannedImage]:
    return sorted((image for image in task.images if image.image_id in image_ids), key=lambda image: image.image_id)


def _run(repairs: Sequence[Repair], job: Job, engine: Engine, lock: BuildLock) -> dict[str, TaskResult]:
    results: dict[str, TaskResult] = {}
    with PackingProgress() as progress:
        progress.expect(len(repairs))
        for repair, result in execute(partial(repair_task, job=job), repairs, engine):
            lock.check()
            results[repair.task.name] = result
            failed = len(failed_images(result.accounts, repair.task.split))
            progress.add(1, result.images.nbytes + result.masks.nbytes, failed)
    return results


def _repairs(
    planned: PlannedBuild, dataset: Dataset, rows: Sequence[IndexRow], accounts: Sequence[Account]
) -> list[Repair]:
    """Return the tasks in which something failed, from all rounds of the build."""
    tasks = list(planned.plan.tasks)
    failed = {split: failed_images(accounts, split, at_first=True) for split in SPLITS}
    while fresh := planned.next_round(tasks, failed):
        tasks += fresh
    by_image: dict[tuple[str, str], list[Account]] = {}
    for account in accounts:
        if account.status != UNKNOWN:
            by_image.setdefault((account.split, account.image_id), []).append(account)
    if set(by_image) != {(task.split, image.image_id) for task in tasks for image in task.images}:
        raise UserError(
            f"{dataset.root}: its accounts do not match this command and source: build again, with --overwrite or "
            "another --out"
        )
    shards = {shard.path: shard for shard in dataset.info.shards}
    of_shard: dict[str, list[IndexRow]] = {}
    for row in rows:
        of_shard.setdefault(row.shard, []).append(row)
    repairs = []
    for task in tasks:
        mine = tuple(account for image in task.images for account in by_image[task.split, image.image_id])
        if any(account.failed for account in mine):
            repairs.append(Repair(task, shards.get(task.path), tuple(of_shard.get(task.path, ())), mine))
    return repairs


def _old_samples(repair: Repair, root: Location) -> dict[str, Sample]:
    """Return a dict from ImageIDs to samples of the old shard."""
    if repair.shard is None:
        return {}
    where = root / repair.shard.path
    data = fetch_one(Request(where))
    if hashlib.sha256(data).hexdigest() != repair.shard.sha256:
        raise DatasetError(f"{where}: its sha256 is not the one in dataset.json: build the dataset again")
    samples = {}
    for row in repair.rows:
        members = parse_members(data[row.offset : row.offset + row.nbytes], row.image_id, where=str(where))
        samples[row.image_id] = Sample.from_members(row.image_id, members, where=str(where))
    return samples


def _known_masks(image: PlannedImage, sample: Sample, old: dict[Key, Account]) -> PlannedImage:
    """Return the planned image with the sample's masks, in the order of its objects, instead of those in zips."""
    packed = iter([i.segmentation for i in sample.instances if i.segmentation is not None])
    objects = []
    for planned in image.objects:
        note = planned.annotation
        account = old.get(("mask", image.image_id, note.mask_path, note.box_id)) if note.mask_path else None
        rle = next(packed) if account is not None and account.status == PACKED else None
        if rle is not None and isinstance(planned.mask, Member):
            planned = replace(planned, mask=InlineMask(rle.width, rle.height, json.dumps(rle.to_json())))
        objects.append(planned)
    return replace(image, objects=tuple(objects))


def _merged(old: Account, new: Account) -> Account:
    """Return the account after a retry: unchanged if packed before, with the former status if recovered."""
    if old.status == PACKED:
        return old
    if new.status != PACKED:
        return new
    return replace(new, detail="; ".join(filter(None, (f"{RECOVERED}{old.status}", new.detail))))


def _check_untouched(repair: Repair, rows: Sequence[IndexRow], touched: dict[str, tuple]) -> None:
    """Check that samples to which nothing was added are unchanged."""
    before = {row.image_id: row.crc32 for row in repair.rows}
    for row in rows:
        if row.image_id not in touched and row.crc32 != before[row.image_id]:
            raise DatasetError(
                f"{repair.task.path}: sample {row.image_id} was written by another release: build the dataset again"
            )
