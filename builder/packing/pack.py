"""Pack one shard: fetch, check, encode and write, with an account of every requested image and mask."""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Self, TypeAlias

from builder.fetching.fetch import Refusal, Request, fetch
from builder.fetching.traffic import Meter, Traffic
from builder.fetching.zip_members import MemberError, read_members
from builder.packing.images import check_image, encode_mask, pixel_box
from builder.packing.inline_masks import EncodedMask, encode_inline
from builder.packing.picture_frame import Frame, frame_of
from builder.sources.base import FLAGS
from builder.tasks.plan import (
    Annotation,
    Failure,
    FractionalPolygon,
    InlineMask,
    Member,
    PlannedImage,
    PlannedObject,
    ShardTask,
    task_fingerprint,
)
from shards.format import rle
from shards.format.accounts import BOX_FROM_MASK, PACKED, Account
from shards.format.dataset import Shard
from shards.format.index_schema import IndexRow
from shards.format.sample import Instance, Sample, canonical_json
from shards.format.shard_tar import pack_shard
from shards.format.validation import mask_fits
from shards.storage.location import Location
from shards.storage.retry import write

Masks: TypeAlias = Mapping[Member, bytes | MemberError]  # contents of members of mask zips

RECORDS = ".build"

IMAGES_PER_READ = 32  # these are decoded while the next ones are being fetched
SPARE_BYTES_PER_IMAGE = 4 << 10  # read between the masks of a zip to save requests; 1 % of an image of Open Images

# A sample, or None if the image cannot be used; and the accounts of the image and of each of its masks.
Outcome: TypeAlias = tuple[Sample | None, list[Account]]


@dataclass(frozen=True)
class Job:
    """What all tasks of a build share: root, fingerprint of the plan, whether reads are unsigned, conversion."""

    root: Location
    fingerprint: str
    anonymous_images: bool = False
    anonymous_masks: bool = False
    to_jpeg: int = 0  # quality at which images of other formats are converted; 0 for none


@dataclass(frozen=True)
class TaskResult:
    """A finished task: shard (None if no image could be packed), index rows, accounts, and the traffic of this run."""

    shard: Shard | None
    rows: tuple[IndexRow, ...]
    accounts: tuple[Account, ...]
    images: Traffic = Traffic()
    masks: Traffic = Traffic()

    def to_record(self, fingerprint: str) -> bytes:
        """Return the object that marks the task as finished, without the traffic of this run."""
        return canonical_json({"task": fingerprint, "shard": self.shard, "rows": self.rows, "accounts": self.accounts})

    @classmethod
    def from_record(cls, data: bytes, fingerprint: str) -> Self | None:
        """Invert `to_record`; None if the record is damaged or of another task."""
        try:
            value = json.loads(data)
            if value["task"] != fingerprint:
                return None
            return cls(
                shard=None if value["shard"] is None else Shard(**value["shard"]),
                rows=tuple(map(IndexRow.from_values, value["rows"])),
                accounts=tuple(Account(**account) for account in value["accounts"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


def record_location(root: Location, task: ShardTask) -> Location:
    """Return the location of the record of a finished task."""
    return root / RECORDS / f"{task.name}.json"


def pack_task(task: ShardTask, job: Job) -> TaskResult:
    """Write the shard of a task, then its record; StorageError if a source or the root is unavailable."""
    images, masks = Meter(), Meter()
    outcomes = pack_images(task.images, task.split, job, images, masks)
    samples = [sample for sample, _ in outcomes if sample is not None]
    packed = pack_shard(samples, split=task.split, path=task.path) if samples else None
    if packed is not None:
        write(job.root / task.path, packed.data)
    result = TaskResult(
        shard=None if packed is None else packed.shard,
        rows=() if packed is None else packed.rows,
        accounts=tuple(account for _, accounts in outcomes for account in accounts),
        images=images.total,
        masks=masks.total,
    )
    write(record_location(job.root, task), result.to_record(task_fingerprint(job.fingerprint, task)))
    return result


def pack_images(
    images: Sequence[PlannedImage], split: str, job: Job, image_meter: Meter, mask_meter: Meter
) -> list[Outcome]:
    """Fetch images and masks and make samples of them; images are decoded while the next ones are being fetched.

    An image that cannot be decoded is fetched once more, because its bytes may have been damaged in transit.
    """
    parts = [images[start : start + IMAGES_PER_READ] for start in range(0, len(images), IMAGES_PER_READ)]
    outcomes: list[Outcome] = []
    pool = ThreadPoolExecutor(2)  # images and masks are on different servers
    try:
        masks_read = pool.submit(read_masks, images, job, mask_meter, SPARE_BYTES_PER_IMAGE)
        reads = [pool.submit(_read_images, part, job, image_meter) for part in parts]
        masks = masks_read.result()
        for part, read in zip(parts, reads, strict=True):
            outcomes += _pack_part(part, read.result(), masks, split, job, image_meter)
    finally:
        pool.shutdown(cancel_futures=True)
    return outcomes


def _pack_part(
    images: Sequence[PlannedImage],
    contents: Sequence[bytes | Refusal],
    masks: Masks,
    split: str,
    job: Job,
    meter: Meter,
) -> list[Outcome]:
    def pack(image: PlannedImage, data: bytes | Refusal) -> Outcome:
        return pack_image(image, data, masks, split, job.to_jpeg)

    outcomes = [pack(image, data) for image, data in zip(images, contents, strict=True)]
    doubtful = [index for index, (_, accounts) in enumerate(outcomes) if accounts[0].status == "image-undecodable"]
    again = _read_images([images[index] for index in doubtful], job, meter)
    for index, data in zip(doubtful, again, strict=True):
        if data != contents[index]:
            outcomes[index] = pack(images[index], data)
    return outcomes


def pack_image(image: PlannedImage, data: bytes | Refusal, masks: Masks, split: str, to_jpeg: int = 0) -> Outcome:
    """Make a sample of an image, without any I/O; an object whose mask fails stays in it as a box without a mask.

    `to_jpeg` is that of `check_image`.
    """

    def account(status: str, detail: str, annotation: Annotation | None = None) -> Account:
        if annotation is None:
            return Account("image", split, image.image_id, "", image.file_name, status, detail)
        return Account("mask", split, image.image_id, annotation.box_id, annotation.mask_path, status, detail)

    stored = check_image(data, to_jpeg)
    frame = stored if isinstance(stored, Failure) else frame_of(*stored, image.stated)
    if isinstance(frame, Failure):
        with_mask = [planned.annotation for planned in image.objects if planned.annotation.mask_path]
        lost = [account("image-failed", frame.status, annotation) for annotation in with_mask]
        return None, [account(frame.status, frame.detail), *lost]

    accounts = [account(PACKED, frame.note)]
    instances: list[Instance] = []
    for planned in image.objects:
        found = _resolve_mask(planned, masks, frame) if planned.annotation.mask_path else None
        mask = found.mask if isinstance(found, EncodedMask) else None
        instance, remark = _pack_object(planned.annotation, mask, frame)
        if isinstance(found, Failure):
            accounts.append(account(found.status, found.detail, planned.annotation))
        elif found is not None:
            accounts.append(account(PACKED, "; ".join(filter(None, (found.remark, remark))), planned.annotation))
        if instance is not None:
            instances.append(instance)
    assert not isinstance(stored, Failure)
    sample = Sample(
        image_id=image.image_id,
        image=stored[0],
        width=frame.width,
        height=frame.height,
        instances=tuple(instances),
        verified_present=image.verified_present,
        verified_absent=image.verified_absent,
        not_exhaustive=image.not_exhaustive or (),
        **asdict(image.metadata),
    )
    return sample, accounts


def _resolve_mask(planned: PlannedObject, masks: Masks, frame: Frame) -> EncodedMask | Failure:
    """Return a mask at the size of its image, from a zip or from the annotations, or why there is none."""
    place = planned.mask
    if isinstance(place, Failure):
        return place
    if isinstance(place, FractionalPolygon):
        place = place.at(*frame.annotated)
    if isinstance(place, InlineMask):
        inline = encode_inline(place, *frame.annotated)
        return inline if isinstance(inline, Failure) else replace(inline, mask=frame.stored_mask(inline.mask))
    mask = encode_mask(None if place is None else masks[place], frame.width, frame.height)
    return mask if isinstance(mask, Failure) else EncodedMask(mask)


def _pack_object(annotation: Annotation, mask: rle.Rle | None, frame: Frame) -> tuple[Instance | None, str]:
    """Return the object in pixels, None if neither its box nor its mask has an extent, and a remark on its mask.

    A box that its mask is not in belongs to something else, and `inspect-shards --verify` would report it.
    """
    bbox, remark = pixel_box(frame.stored_box(annotation.box), frame.width, frame.height), ""
    if min(bbox[2:]) <= 0:
        if mask is None:
            return None, ""
        bbox = rle.bounds(mask)
    elif mask is not None and not mask_fits(mask, bbox):
        bbox, remark = rle.bounds(mask), BOX_FROM_MASK
    area = None if annotation.area is None else annotation.area * frame.scale
    instance = Instance(
        category_id=annotation.category_id,
        bbox=bbox,
        segmentation=mask,
        box_id=annotation.box_id,
        label=annotation.label,
        predicted_iou=annotation.predicted_iou,
        area=area,
        prediction=None if mask is None else annotation.prediction,
        **{flag: getattr(annotation, flag) for flag in FLAGS.values()},
    )
    return instance, remark


def _read_images(images: Sequence[PlannedImage], job: Job, meter: Meter) -> list[bytes | Refusal]:
    return fetch([Request(Location(image.url, job.anonymous_images)) for image in images], meter)


def read_masks(images: Sequence[PlannedImage], job: Job, meter: Meter, spare_per_image: int) -> Masks:
    """Return the contents of all masks of the images that are in zips; raises as `read_members`."""
    members, spare = members_of(images), spare_per_image * len(images)
    contents = read_members(members, anonymous=job.anonymous_masks, spare=spare, meter=meter)
    return dict(zip(members, contents, strict=True))


def members_of(images: Iterable[PlannedImage]) -> list[Member]:
    """Return the masks of the images that are in zips, in order."""
    return [planned.mask for image in images for planned in image.objects if isinstance(planned.mask, Member)]
