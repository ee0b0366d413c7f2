"""One shard task: fetch, check, encode, write; every image and every mask asked for is accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

from builder.annotations import Annotation
from builder.decode import Failure, check_jpeg, encode_mask, pixel_box
from builder.fetch import Refusal, Request, fetch
from builder.maskzip import MemberError, read_members
from builder.openimages import OpenImages
from builder.plan import Member, PlannedImage, ShardTask
from shards import rle
from shards.dataset import IndexRow, Shard
from shards.sample import Instance, Sample, canonical_json
from shards.storage import Location
from shards.writer import pack_shard

RECORDS = ".build"

PACKED = "packed"


@dataclass(frozen=True, slots=True)
class Account:
    """What became of one image or mask: the columns of `shards.dataset.ACCOUNTS_SCHEMA`.

    `status` is `packed`, or one of image-missing, image-refused, image-undecodable, image-too-large; mask-missing,
    mask-undecodable, mask-empty, mask-shape, and image-failed for the masks of an image that was not packed.
    """

    kind: str
    split: str
    image_id: str
    box_id: str
    source: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Job:
    """What all tasks of a build share: where to write, where to read, the plan's fingerprint."""

    root: Location
    source: OpenImages
    fingerprint: str


@dataclass(frozen=True)
class TaskResult:
    """A finished task: its shard (None when no image could be packed), index rows, accounts; and bytes fetched."""

    shard: Shard | None
    rows: tuple[IndexRow, ...]
    accounts: tuple[Account, ...]
    fetched: int = 0

    def to_record(self, fingerprint: str) -> bytes:
        """The object that marks the task as finished; `fetched`, which tells of a run, is left out."""
        return canonical_json(
            {
                "plan": fingerprint,
                "shard": None if self.shard is None else asdict(self.shard),
                "rows": [asdict(row) for row in self.rows],
                "accounts": [asdict(account) for account in self.accounts],
            }
        )

    @classmethod
    def from_record(cls, data: bytes, fingerprint: str) -> TaskResult | None:
        """The inverse of `to_record`; None when the record is damaged or belongs to another plan."""
        try:
            value = json.loads(data)
            if value["plan"] != fingerprint:
                return None
            lists = ("classes", "instances", "masks", "groups")
            return cls(
                shard=None if value["shard"] is None else Shard(**value["shard"]),
                rows=tuple(IndexRow(**{**row, **{name: tuple(row[name]) for name in lists}}) for row in value["rows"]),
                accounts=tuple(Account(**account) for account in value["accounts"]),
            )
        except (ValueError, KeyError, TypeError):
            return None


def record_location(root: Location, task: ShardTask) -> Location:
    """Where the record of a finished task lies."""
    return root / RECORDS / f"{task.name}.json"


def pack_task(task: ShardTask, job: Job) -> TaskResult:
    """Do one task: write its shard, then its record.

    Raises:
        StorageError: a source cannot be read after several attempts, or the shard cannot be written.
    """
    with ThreadPoolExecutor(2) as pool:  # images and masks come from different servers
        images_read = pool.submit(_read_images, task, job)
        masks_read = pool.submit(_read_masks, task, job)
        (images, image_bytes), (masks, mask_bytes) = images_read.result(), masks_read.result()
    samples: list[Sample] = []
    accounts: list[Account] = []
    for image, data in zip(task.images, images, strict=True):
        sample, of_image = pack_image(image, data, masks, task.split)
        accounts += of_image
        if sample is not None:
            samples.append(sample)
    packed = pack_shard(samples, split=task.split, path=task.path) if samples else None
    if packed is not None:
        (job.root / task.path).write(packed.data)
    result = TaskResult(
        shard=None if packed is None else packed.shard,
        rows=() if packed is None else packed.rows,
        accounts=tuple(accounts),
        fetched=image_bytes + mask_bytes,
    )
    record_location(job.root, task).write(result.to_record(job.fingerprint))
    return result


def pack_image(
    image: PlannedImage, data: bytes | Refusal, masks: Mapping[Member, bytes | MemberError], split: str
) -> tuple[Sample | None, list[Account]]:
    """Make a sample of an image and its masks. Pure.

    Returns:
        The sample, or None where the image cannot be used; and an account of the image and of each mask asked for. An
        object whose mask fails stays in the sample as a box without a mask.
    """

    def account(status: str, detail: str, annotation: Annotation | None = None) -> Account:
        if annotation is None:
            return Account("image", split, image.image_id, "", f"{image.image_id}.jpg", status, detail)
        return Account("mask", split, image.image_id, annotation.box_id, annotation.mask_path, status, detail)

    checked = check_jpeg(data)
    if isinstance(checked, Failure):
        failed = [account(checked.status, checked.detail)]
        for planned in image.objects:
            if planned.annotation.mask_path:
                failed.append(account("image-failed", checked.status, planned.annotation))
        return None, failed

    width, height = checked
    accounts = [account(PACKED, "")]
    instances: list[Instance] = []
    for planned in image.objects:
        mask: rle.Rle | None = None
        if planned.annotation.mask_path:
            encoded = encode_mask(None if planned.mask is None else masks[planned.mask], width, height)
            if isinstance(encoded, Failure):
                accounts.append(account(encoded.status, encoded.detail, planned.annotation))
            else:
                mask = encoded
                accounts.append(account(PACKED, "", planned.annotation))
        instance = _instance(planned.annotation, mask, width, height)
        if instance is not None:
            instances.append(instance)
    metadata = image.metadata
    assert isinstance(data, bytes)
    sample = Sample(
        image_id=image.image_id,
        image=data,
        width=width,
        height=height,
        instances=tuple(instances),
        verified_present=image.verified_present,
        verified_absent=image.verified_absent,
        rotation=metadata.rotation,
        license=metadata.license,
        author=metadata.author,
        author_url=metadata.author_url,
        original_url=metadata.original_url,
        title=metadata.title,
    )
    return sample, accounts


def _instance(annotation: Annotation, mask: rle.Rle | None, width: int, height: int) -> Instance | None:
    """None where neither the box nor the mask has an extent."""
    bbox = pixel_box(annotation.box, width, height)
    if min(bbox[2:]) <= 0:
        if mask is None:
            return None
        bbox = rle.bounds(mask)
    return Instance(
        category_id=annotation.category_id,
        bbox=bbox,
        segmentation=mask,
        box_id=annotation.box_id,
        label=annotation.label,
        is_group_of=annotation.is_group_of,
        is_occluded=annotation.is_occluded,
        is_truncated=annotation.is_truncated,
        is_depiction=annotation.is_depiction,
        is_inside=annotation.is_inside,
        predicted_iou=annotation.predicted_iou,
    )


def _read_images(task: ShardTask, job: Job) -> tuple[Sequence[bytes | Refusal], int]:
    answers = fetch([Request(replace(job.source.images, url=image.url)) for image in task.images])
    return answers, sum(len(answer) for answer in answers if isinstance(answer, bytes))


def _read_masks(task: ShardTask, job: Job) -> tuple[dict[Member, bytes | MemberError], int]:
    members = [planned.mask for image in task.images for planned in image.objects if planned.mask is not None]
    contents, fetched = read_members(members, anonymous=job.source.annotations.anonymous)
    return dict(zip(members, contents, strict=True)), fetched
