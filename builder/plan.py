"""The plan of a build: images to shard tasks, bytes to fetch, a fingerprint of all that decides the result. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from builder.annotations import Annotation, Metadata
from shards.dataset import VERSION, Category
from shards.sample import canonical_json
from shards.writer import shard_path


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
class PlannedObject:
    """An annotation, and where its mask lies: None without a mask, or when its zip does not hold it."""

    annotation: Annotation
    mask: Member | None


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
    """One shard to be: the unit of work and of resuming."""

    split: str
    number: int
    images: tuple[PlannedImage, ...]

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


def cut_tasks(split: str, images: Sequence[PlannedImage], images_per_shard: int) -> list[ShardTask]:
    """Cut a split's images, in the order given, into tasks of `images_per_shard` (the last may have fewer)."""
    return [
        ShardTask(split, number, tuple(images[start : start + images_per_shard]))
        for number, start in enumerate(range(0, len(images), images_per_shard))
    ]


def make_plan(categories: Sequence[Category], tasks: Iterable[ShardTask]) -> Plan:
    """The plan, with the sha256 of the canonical JSON of format version, classes and tasks."""
    digest = hashlib.sha256(canonical_json([VERSION, [asdict(category) for category in categories]]))
    tasks = tuple(tasks)
    for task in tasks:
        digest.update(b"\n" + canonical_json(asdict(task)))
    return Plan(tuple(categories), tasks, digest.hexdigest())
