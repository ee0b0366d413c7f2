"""Writing datasets: `DatasetWriter` for your own images, and the tables that finish any dataset."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, TypedDict

import numpy as np

from shards.common.argument_checks import flat, whole
from shards.common.errors import DatasetError, SampleError, StorageError
from shards.common.redact import redact, redact_values
from shards.common.text import counted, did_you_mean, shown
from shards.format import rle
from shards.format.accounts import PACKED, Account, reasons, write_accounts
from shards.format.dataset import ACCOUNTS_FILE, DATASET_FILE, INDEX_FILE, SPLITS, DatasetInfo, Shard, root_location
from shards.format.dataset_card import PICTURE_FILE, README_FILE, CardPicture, count_classes, render_card
from shards.format.image import ImageError, image_size
from shards.format.index import LARGEST_ID
from shards.format.index_schema import IndexRow, index_bytes
from shards.format.sample import ATTRIBUTION, FLAGS, Category, Instance, Sample, canonical_json, extension_of
from shards.format.selection import find_class
from shards.format.shard_tar import pack_shard, seeded_order, shard_path
from shards.format.validation import content_faults
from shards.storage.explain import storage_errors
from shards.storage.location import Location, check_writable
from shards.storage.retry import retrying, write


class Annotation(TypedDict, total=False):
    """One object for `DatasetWriter.add_image`: `category`, and `bbox`, `mask` or both; the rest is optional."""

    category: str | int  # name or id of its class
    bbox: Sequence[float]  # x, y, width, height in pixels; by default the tight box of the mask
    mask: Any  # array [H, W] of the image's size; non-zero is the object
    box_id: str  # unique within the image
    is_group_of: bool  # for this and the other flags see `Instance`
    is_occluded: bool
    is_truncated: bool
    is_depiction: bool
    is_inside: bool
    predicted_iou: float  # estimate of the mask's quality, 0 to 1


class _Spooled(NamedTuple):
    """Where a sample is in the temporary file, and the lengths in bytes of its image and its JSON there."""

    start: int
    image: int
    json: int


class DatasetWriter:
    """Packs images and annotations into a finished dataset. Use it in a `with` statement.

        with DatasetWriter("s3://bucket/pets", classes=["cat", "dog"]) as writer:
            writer.add_image("rex-01", jpeg_bytes, [{"category": "dog", "mask": mask}], split="train")

    Samples of a split are stored in the order of a seeded hash of their keys. They are first collected in a temporary
    file, which needs as much disk space as the dataset (`TMPDIR` chooses the disk). Memory is limited to a few times
    the size of a shard, and about 1 kB per sample.

    Nothing is written to `root` until the `with` block ends without an exception. If writing fails, `root` has no
    `dataset.json` and counts as unfinished.

    Args:
        root: local path or any fsspec URL, without a dataset.
        classes: names of the classes, which get the ids 1, 2, ...; or `Category` objects.
        samples_per_shard: samples per shard; the last shard of a split may have fewer.
        seed: seed of the order in which samples are stored.

    Raises:
        DatasetError: wrong arguments, or `root` already contains a dataset or a part of one.
        StorageError: `root` cannot be written.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Location,
        classes: Iterable[str | Category],
        *,
        samples_per_shard: int = 256,
        seed: int = 0,
    ) -> None:
        self.root = root_location(root)
        self.categories = _categories(classes)
        self.samples_per_shard = whole("samples_per_shard", samples_per_shard, 1)
        self.seed = whole("seed", seed)
        self._spool: BinaryIO | None = None
        self._added: dict[str, dict[str, _Spooled]] = {split: {} for split in SPLITS}

    def __repr__(self) -> str:
        return f"DatasetWriter({str(self.root)!r}, {counted(len(self), 'sample')})"

    def __len__(self) -> int:
        return sum(map(len, self._added.values()))

    def __enter__(self) -> DatasetWriter:
        found = [name for name in (DATASET_FILE, *SPLITS) if (self.root / name).exists()]
        if found:
            what = "a dataset" if DATASET_FILE in found else f"parts of an unfinished dataset (no {DATASET_FILE})"
            names = ", ".join(str(self.root / name) for name in found)
            raise DatasetError(f"{self.root}: already contains {what}: choose another root, or delete {names} first")
        check_writable(self.root, "root")
        self._spool = tempfile.TemporaryFile()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._spool is not None
        with self._spool:
            if kind is None:
                self._finish()
        self._spool = None

    def add_image(
        self,
        image_id: str,
        image: bytes | str | os.PathLike[str],
        instances: Sequence[Annotation | Instance] = (),
        *,
        split: str = "train",
        verified_present: Sequence[str | int] | None = None,
        verified_absent: Sequence[str | int] | None = None,
        not_exhaustive: Sequence[str | int] = (),
        **metadata: Any,
    ) -> None:
        """Add an image with its objects; errors are those of `add`.

        By default the annotations count as complete: classes with an object are verified as present, and all others
        but those of `not_exhaustive` as absent. If some classes were not looked for in this image, pass
        `verified_absent`, perhaps empty: a class in neither list is unknown.

        Args:
            image_id: its key: 1 to 64 letters, digits, `_` and `-`, unique in the dataset.
            image: the bytes of a JPEG or PNG, or the path or URL of one. They are stored untouched, and EXIF
                orientation is ignored.
            instances: its objects; see `Annotation`.
            split: train, val or test.
            verified_present, verified_absent: names or ids of classes that are confirmed or ruled out in the image.
            not_exhaustive: names or ids of classes of which not every object in the image is annotated.
            **metadata: `rotation`, `license`, `author`, `author_url`, `original_url` and `title`; see `Sample`.
        """
        where = f"{self.root}: sample {image_id}"
        for name in metadata.keys() - {"rotation", *ATTRIBUTION}:
            hint = did_you_mean(name, ATTRIBUTION, f"known are rotation, {', '.join(ATTRIBUTION)}")
            raise DatasetError(f"{where}: unknown metadata {name!r}: {hint}")
        if isinstance(image, str | os.PathLike):
            try:
                image = Location(os.fspath(image)).read()
            except StorageError as error:
                raise DatasetError(f"{where}: the image cannot be read: {error}") from error
        if not isinstance(image, bytes):
            raise DatasetError(f"{where}: image is {shown(image)}: give the bytes or the path of a JPEG or PNG")
        try:
            width, height = image_size(image, decode=False)
        except ImageError as error:
            raise DatasetError(
                f"{where}: the image cannot be read ({error}): convert it to JPEG or PNG first"
            ) from error
        objects = tuple(self._instance(value, width, height, where) for value in instances)
        known = {category.id for category in self.categories}
        annotated = known & {instance.category_id for instance in objects}
        present = annotated if verified_present is None else self._ids(verified_present, where)
        partial = self._ids(not_exhaustive, where)
        absent = known - present - annotated - partial if verified_absent is None else self._ids(verified_absent, where)
        labels = tuple(sorted(present)), tuple(sorted(absent)), tuple(sorted(partial))
        self.add(Sample(image_id, image, width, height, objects, *labels, **metadata), split)

    def add(self, sample: Sample, split: str = "train") -> None:
        """Add a finished sample, such as one of another dataset with the same classes.

        Raises:
            DatasetError: the key is invalid or was added before, the image is not one of the stated size, or an
                annotation is wrong: an unknown class, a box outside the image, a mask of another size, and so on.
            StorageError: the temporary file cannot be written.
        """
        if self._spool is None:
            raise DatasetError(f"{self.root}: samples can only be added within `with DatasetWriter(...) as writer:`")
        where = f"{self.root}: sample {sample.image_id}"
        if split not in SPLITS:
            raise DatasetError(f"{where}: split is {shown(split)}: give one of {', '.join(SPLITS)}")
        if any(sample.image_id in added for added in self._added.values()):
            raise DatasetError(f"{where}: was added before: give each image a key of its own")
        for name in ATTRIBUTION:
            if not isinstance(value := getattr(sample, name), str):
                raise DatasetError(f"{where}: {name} is {shown(value)}: give text, or leave it out")
        try:
            members = sample.to_members()
            # As readers see it: for example, whole numbers of a box become floats, which JSON writes differently.
            sample = Sample.from_members(sample.image_id, members, check=False)
            members = sample.to_members()
        except (SampleError, TypeError, ValueError) as error:
            raise DatasetError(f"{where}: cannot be stored: {error}") from error
        for fault in content_faults(sample, None, {category.id for category in self.categories}):
            raise DatasetError(
                f"{where}: {fault}: correct it (a JPEG or PNG; known classes; boxes x, y, width, height inside the "
                "image; masks of the image's size)"
            )
        spooled = _Spooled(self._spool.tell(), len(sample.image), len(members["json"]))
        with storage_errors(tempfile.gettempdir()):
            self._spool.write(sample.image + members["json"])
        self._added[split][sample.image_id] = spooled

    def _ids(self, classes: Sequence[str | int], where: str) -> set[int]:
        return {find_class(self.categories, wanted, where).id for wanted in classes}

    def _instance(self, value: Annotation | Instance, width: int, height: int, where: str) -> Instance:
        if isinstance(value, Instance):
            return value
        if not isinstance(value, Mapping) or "category" not in value:
            raise DatasetError(f"{where}: an instance is {shown(value)}: give a dict with category, and bbox or mask")
        known = list(Annotation.__annotations__)
        if unknown := [key for key in value if key not in known]:
            hint = did_you_mean(unknown[0], known, f"known are {', '.join(known)}")
            raise DatasetError(f"{where}: an instance has the unknown key {unknown[0]!r}: {hint}")
        category = find_class(self.categories, value["category"], where)
        bbox, segmentation = value.get("bbox"), None
        if (mask := value.get("mask")) is not None:
            segmentation = _encode_mask(mask, (height, width), where, category.name)
            bbox = rle.bounds(segmentation) if bbox is None else bbox
        try:
            x, y, w, h = (float(number) for number in bbox)  # type: ignore[union-attr]
        except (TypeError, ValueError):
            hint = "give x, y, width, height in pixels, or a mask"
            raise DatasetError(f"{where}: an instance of {category.name} has the bbox {shown(bbox)}: {hint}") from None
        flags: dict[str, Any] = {name: bool(value.get(name)) for name in FLAGS}
        box_id, iou = str(value.get("box_id", "")), value.get("predicted_iou")
        return Instance(category.id, (x, y, w, h), segmentation, box_id, category.mid, **flags, predicted_iou=iou)

    def _finish(self) -> None:
        if not len(self):
            raise DatasetError(f"{self.root}: no sample was added: there is nothing to write")
        rows: list[IndexRow] = []
        shards: list[Shard] = []
        accounts: list[Account] = []
        for split, added in self._added.items():
            order = seeded_order(added, self.seed)
            for number, first in enumerate(range(0, len(order), self.samples_per_shard)):
                keys = order[first : first + self.samples_per_shard]
                samples = [self._read(key, added[key]) for key in keys]
                packed = pack_shard(samples, split=split, path=shard_path(split, number))
                write(self.root / packed.shard.path, packed.data)
                rows += packed.rows
                shards.append(packed.shard)
                accounts += [account for sample in samples for account in _accounts(sample, split)]
        command = f"DatasetWriter(samples_per_shard={self.samples_per_shard}, seed={self.seed})"
        origin = {"name": "DatasetWriter", "samples_per_shard": self.samples_per_shard, "seed": self.seed}
        write_tables(self.root, rows, shards, self.categories, accounts, source=origin, command=command)

    def _read(self, image_id: str, spooled: _Spooled) -> Sample:
        assert self._spool is not None
        self._spool.seek(spooled.start)
        image, annotations = self._spool.read(spooled.image), self._spool.read(spooled.json)
        return Sample.from_members(image_id, {extension_of(image): image, "json": annotations})


def _encode_mask(mask: Any, size: tuple[int, int], where: str, name: str) -> rle.Rle:
    """Encode a mask of `size`, (height, width), of class `name`."""
    try:
        bits = np.asarray(mask)
    except (TypeError, ValueError) as error:  # rows of different lengths, or a tensor on a GPU
        hint = "give an array [H, W] of the image's size"
        raise DatasetError(f"{where}: a mask of {name} is not an array: {hint}") from error
    if bits.shape != size:
        problem = f"a mask has the shape {bits.shape}, the image is [H, W] = {size}"
        raise DatasetError(f"{where}: {problem}: resize the mask to the image first")
    if not bits.any():
        raise DatasetError(f"{where}: a mask of {name} has no pixel: leave it out, or give a bbox")
    return rle.encode(bits)


def _categories(classes: Iterable[str | Category]) -> tuple[Category, ...]:
    given = list(classes) if isinstance(classes, Iterable) and not isinstance(classes, str) else []
    if not given or not all(isinstance(each, str | Category) for each in given):
        raise DatasetError(f"classes is {shown(classes)}: give a list of names, such as ['cat', 'dog']")
    numbered = enumerate(given, start=1)
    categories = tuple(_category(c if isinstance(c, Category) else Category(number, c, c)) for number, c in numbered)
    for number, name in ((category.id, category.name) for category in categories):
        if not 1 <= number <= LARGEST_ID:
            raise DatasetError(f"class {name!r} has the id {number}: ids are from 1 to {LARGEST_ID}")
        if sum(number == category.id or name == category.name for category in categories) > 1:
            raise DatasetError(f"class {name!r} or its id {number} occurs more than once: give each class once")
    return categories


def _category(given: Category) -> Category:
    """Return a class as opening a dataset will read it."""
    number = whole(f"the id of class {shown(given.name)}", given.id)
    name, mid = (
        str(text) if isinstance(text, str) else text for text in (given.name, given.mid)
    )  # numpy's are not str
    try:
        category = flat(Category, {"id": number, "name": name, "mid": mid})
    except ValueError as error:
        raise DatasetError(f"{error}: give Category(id, name, mid), where name and mid are text") from error
    if not category.name.strip():
        raise DatasetError(f"class {number} has the name {category.name!r}: give each class a name")
    return category


def _accounts(sample: Sample, split: str) -> list[Account]:
    return [Account("image", split, sample.image_id, "", sample.file_name, PACKED)] + [
        Account("mask", split, sample.image_id, instance.box_id, f"annotations[{number}]", PACKED)
        for number, instance in enumerate(sample.instances)
        if instance.source_mask is not None
    ]


def write_tables(
    root: Location,
    rows: Sequence[IndexRow],
    shards: Sequence[Shard],
    categories: Sequence[Category],
    accounts: Sequence[Account],
    picture: CardPicture | None = None,
    *,
    plan: str = "",
    source: dict[str, Any],
    command: str,
) -> DatasetInfo:
    """Write accounts, card with its picture, index and `dataset.json`, in this order, without credentials of URLs.

    `source`, where the data came from, is JSON; its `name` selects the text of the card, which shows `command`.
    """
    write(root / ACCOUNTS_FILE, write_accounts(accounts))
    counts = count_classes(rows, categories)
    card = render_card(categories, counts, shards, redact(command), reasons(accounts), source["name"], picture)
    if picture is not None:
        write(root / PICTURE_FILE, picture.jpeg)
    write(root / README_FILE, card.encode())
    safe = redact_values(json.loads(canonical_json(source)))
    return retrying(lambda: finish_dataset(root, rows, shards, categories, plan=plan, source=safe))


def finish_dataset(
    root: Location,
    rows: Iterable[IndexRow],
    shards: Sequence[Shard],
    categories: Sequence[Category],
    *,
    plan: str = "",
    source: dict[str, Any] | None = None,
) -> DatasetInfo:
    """Write `index.parquet`, then `dataset.json`, to a root that has the shards: the dataset is finished.

    Rows, shards and categories may be in any order. A DatasetError is raised if rows and shards contradict each other.
    """
    shards = sorted(shards, key=lambda shard: (SPLITS.index(shard.split), shard.path))
    index = index_bytes(rows, {shard.path: shard.samples for shard in shards})
    info = DatasetInfo(
        categories=tuple(sorted(categories, key=lambda category: category.id)),
        shards=tuple(shards),
        index_sha256=hashlib.sha256(index).hexdigest(),
        plan=plan,
        source=source or {},
    )
    (root / INDEX_FILE).write(index)
    (root / DATASET_FILE).write(canonical_json(info.to_json()))
    return info
