"""The plan of a build: images to shard tasks, bytes to fetch, a fingerprint of all that decides the result. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shards.format.dataset import VERSION, Category
from shards.format.sample import canonical_json
from shards.format.shard_tar import shard_path


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object of an image, as its source describes it.

    Attributes:
        category_id: the chosen class that owns its label.
        label: the source's own label: a MID of Open Images, a category's name in COCO.
        box: (x1, x2, y1, y2) as fractions of the image, as the source has them.
        mask_path: what the accounts call its mask, such as its name in the source's zip; "" without a mask.
        box_id: Open Images' BoxID ("" without a mask, since only the mask table has it), or COCO's annotation id.
        predicted_iou: the source's estimate of the mask's quality; None without one.
    """

    category_id: int
    label: str
    box: tuple[float, float, float, float]
    mask_path: str = ""
    box_id: str = ""
    predicted_iou: float | None = None
    is_group_of: bool = False
    is_occluded: bool = False
    is_truncated: bool = False
    is_depiction: bool = False
    is_inside: bool = False


@dataclass(frozen=True, slots=True)
class Metadata:
    """What is known of an image beside its objects; the fields of `shards.format.sample.Sample`."""

    rotation: int = 0
    license: str = ""
    author: str = ""
    author_url: str = ""
    original_url: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a remote zip.

    Attributes:
        zip_url: the zip.
        name: the file's name in it.
        start: of its local header, in bytes.
        end: where the next header or the central directory begins, at most.
        method: 0 (stored) or 8 (deflated), as the zip format numbers them.
        crc32: of the uncompressed bytes.
        compressed, size: length in the zip and uncompressed, in bytes.
    """

    zip_url: str
    name: str
    start: int
    end: int
    method: int
    crc32: int
    compressed: int
    size: int


@dataclass(frozen=True, slots=True)
class InlineMask:
    """A mask that the annotations themselves hold.

    Attributes:
        width, height: of the image that it was drawn for, in pixels.
        segmentation: COCO's, as JSON text: polygons, or an RLE with its runs as numbers or as a string.
    """

    width: int
    height: int
    segmentation: str


@dataclass(frozen=True, slots=True)
class Withheld:
    """A mask that the source has and the command does not want: the status and the detail of its account."""

    status: str
    detail: str


MaskPlace = Member | InlineMask | Withheld


@dataclass(frozen=True, slots=True)
class PlannedObject:
    """An annotation, and where its mask lies: None without a mask, or when its zip does not hold it."""

    annotation: Annotation
    mask: MaskPlace | None

    @property
    def has_mask(self) -> bool:
        """Whether the source has a mask of it and it is wanted."""
        return bool(self.annotation.mask_path) and not isinstance(self.mask, Withheld)


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One sample to be: the JPEG's URL, the objects, the verified category ids, and what attribution asks for."""

    image_id: str
    url: str
    objects: tuple[PlannedObject, ...]
    verified_present: tuple[int, ...]
    verified_absent: tuple[int, ...]
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to be: the unit of work and of resuming.

    `digest`, 64 hex digits, changes with anything of it. It is made once, where the task is: for a thousand images it
    takes as long as decoding a hundred of them.
    """

    split: str
    number: int
    images: tuple[PlannedImage, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        text = canonical_json([self.split, self.number, self.images])
        object.__setattr__(self, "digest", hashlib.sha256(text).hexdigest())

    @property
    def name(self) -> str:
        """Of the task: `train-000000`."""
        return f"{self.split}-{self.number:06d}"

    @property
    def path(self) -> str:
        """Of the shard below the root: `train/000000.tar`."""
        return shard_path(self.split, self.number)


@dataclass(frozen=True)
class Plan:
    """All tasks of a build and the classes; `fingerprint` is 64 hex digits that change with any byte of the result."""

    categories: tuple[Category, ...]
    tasks: tuple[ShardTask, ...]
    fingerprint: str


def cut_tasks(split: str, images: Sequence[PlannedImage], images_per_shard: int, *, first: int = 0) -> list[ShardTask]:
    """Cut a split's images, in the order given, into tasks of `images_per_shard` (the last may have fewer).

    `first` is the number of the first task.
    """
    return [
        ShardTask(split, number, tuple(images[start : start + images_per_shard]))
        for number, start in enumerate(range(0, len(images), images_per_shard), start=first)
    ]


def make_plan(categories: Sequence[Category], tasks: Iterable[ShardTask], rules: Any = None) -> Plan:
    """The plan, with the sha256 of the canonical JSON of format version, classes, rules and the tasks' digests.

    `rules` is what decides, beside the tasks, which images replace those that fail; any JSON value.
    """
    tasks = tuple(tasks)
    text = canonical_json([VERSION, list(categories), rules, [task.digest for task in tasks]])
    return Plan(tuple(categories), tasks, hashlib.sha256(text).hexdigest())


def task_fingerprint(plan: str, task: ShardTask) -> str:
    """64 hex digits that change with any byte of a task's result; `plan` is the fingerprint of the build's plan."""
    return hashlib.sha256(canonical_json([plan, task.digest])).hexdigest()
