"""The plan of a build: images per shard, bytes to fetch, and a fingerprint of everything that decides the result."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from shards.format.dataset import VERSION, Category
from shards.format.sample import OMIT_NONE, MaskPrediction, canonical_json
from shards.format.shard_tar import shard_path

Box: TypeAlias = tuple[float, float, float, float]
Size: TypeAlias = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object of an image, as its source describes it.

    Attributes:
        category_id: the class of the dataset that its label counts for.
        label: the source's label: a MID of Open Images, a category name of COCO.
        box: (x1, x2, y1, y2) as fractions of the image, as the source has them.
        mask_path: name of its mask in the accounts, such as the file name in the source's zip; "" without a mask.
        box_id: Open Images' BoxID ("" without a mask, because only the mask table has it), or COCO's annotation id.
        predicted_iou: the source's estimate of the mask's quality; None without an estimate.
        area: the object's area in pixels by the source; None if it gives none.
        prediction: of a mask that a run predicted, in files of `maskstream export`; None for any other.
    """

    category_id: int
    label: str
    box: Box
    mask_path: str = ""
    box_id: str = ""
    predicted_iou: float | None = None
    is_group_of: bool = False
    is_occluded: bool = False
    is_truncated: bool = False
    is_depiction: bool = False
    is_inside: bool = False
    area: float | None = field(default=None, metadata=OMIT_NONE)
    prediction: MaskPrediction | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, slots=True)
class Metadata:
    """Metadata of an image, with the names that `shards.format.sample.Sample` has for them."""

    rotation: int = 0
    license: str = ""
    author: str = ""
    author_url: str = ""
    original_url: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a remote zip, of `compressed` bytes in the zip and `size` uncompressed.

    Attributes:
        start: offset of its local header in bytes.
        end: upper bound of its end in bytes: the next header or the central directory.
        method: 0 (stored) or 8 (deflated), as in the zip format.
        crc32: CRC of the uncompressed bytes.
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
    """A mask in the annotations, made for an image of this size in pixels.

    `segmentation` is COCO's, as JSON text: polygons, or an RLE with its runs as numbers or as a string.
    """

    width: int
    height: int
    segmentation: str


@dataclass(frozen=True, slots=True)
class FractionalPolygon:
    """A mask in annotations that do not state the size of the image: x, y, x, y, ... of a polygon, as JSON text.

    The numbers are fractions of the width and height of the upright picture, as its EXIF orientation has it.
    """

    corners: str

    def at(self, width: int, height: int) -> InlineMask:
        """Return the mask for a picture of this size in pixels."""
        numbers = json.loads(self.corners)
        polygon = [number * (height if place % 2 else width) for place, number in enumerate(numbers)]
        return InlineMask(width, height, json.dumps([polygon]))


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image or mask is not packed: status and detail of its account, the same on every run."""

    status: str
    detail: str


FoundMask = Member | InlineMask | FractionalPolygon
MaskPlace = FoundMask | Failure  # a failure if a filter excludes the mask


@dataclass(frozen=True, slots=True)
class PlannedObject:
    """An annotation and the place of its mask; None without a mask, or if the zip does not contain it."""

    annotation: Annotation
    mask: MaskPlace | None

    @property
    def has_mask(self) -> bool:
        """True if the source has a mask of the object that no run predicted, and no filter excludes it."""
        is_of_source = self.annotation.mask_path and self.annotation.prediction is None
        return bool(is_of_source) and not isinstance(self.mask, Failure)


@dataclass(frozen=True, slots=True)
class StatedFile:
    """What the annotations state about an image's file: its name, and its size in pixels; None without a size."""

    name: str
    width: int | None
    height: int | None


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """An image to pack: the JPEG's URL, its objects, verified category ids and metadata.

    `stated` is None if the annotations do not describe the file, which then is `<ImageID>.jpg`; `not_exhaustive`, the
    classes of which not every object is annotated, is None if the source does not state it.
    """

    image_id: str
    url: str
    objects: tuple[PlannedObject, ...]
    verified_present: tuple[int, ...]
    verified_absent: tuple[int, ...]
    metadata: Metadata
    stated: StatedFile | None = field(default=None, metadata=OMIT_NONE)
    not_exhaustive: tuple[int, ...] | None = field(default=None, metadata=OMIT_NONE)

    @property
    def file_name(self) -> str:
        """The name of the file at the source."""
        return f"{self.image_id}.jpg" if self.stated is None else self.stated.name


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to pack: the unit of work and of resuming; `number` is its position in the split, from 0.

    `digest` is the SHA-256 of the other fields; computed once, because it takes a tenth of the time of decoding.
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
        """Name of the task, such as `train-000000`."""
        return f"{self.split}-{self.number:06d}"

    @property
    def path(self) -> str:
        """Path of the shard under the root, such as `train/000000.tar`."""
        return shard_path(self.split, self.number)


@dataclass(frozen=True)
class Plan:
    """Classes of a build, its tasks without replacements, and a SHA-256 that changes with any byte of the result."""

    categories: tuple[Category, ...]
    tasks: tuple[ShardTask, ...]
    fingerprint: str


def cut_tasks(split: str, images: Sequence[PlannedImage], images_per_shard: int, *, first: int = 0) -> list[ShardTask]:
    """Cut the images of a split, in the given order, into tasks numbered from `first`."""
    return [
        ShardTask(split, number, tuple(images[start : start + images_per_shard]))
        for number, start in enumerate(range(0, len(images), images_per_shard), start=first)
    ]


def make_plan(categories: Sequence[Category], tasks: Iterable[ShardTask], rules: Any = None) -> Plan:
    """Return the plan of the tasks of the first round; its fingerprint covers format version, classes, tasks and rules.

    `rules` is any JSON value that, together with the tasks, decides which images replace those that fail.
    """
    tasks = tuple(tasks)
    text = canonical_json([VERSION, list(categories), rules, [task.digest for task in tasks]])
    return Plan(tuple(categories), tasks, hashlib.sha256(text).hexdigest())


def task_fingerprint(plan: str, task: ShardTask) -> str:
    """Return a SHA-256 in hex that changes with any byte of a task's result, given the fingerprint of its plan."""
    return hashlib.sha256(canonical_json([plan, task.digest])).hexdigest()
