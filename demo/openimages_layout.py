"""Draw the scenes of a `SceneConfig` and write them in the layout of Open Images: images, tables, mask zips."""

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.openimages_tables import SPLITS, BoxRow, ImageRecord, write_classes, write_split
from demo.street import MIDS, Scene, SceneObject, draw_scene

_PARENTS = {"Man": "Person", "Woman": "Person", "Boy": "Person", "Girl": "Person"} | {
    "Van": "Car",
    "Limousine": "Car",
    "Stop sign": "Traffic sign",
}
_ABSENT_SOMETIMES = ("/m/0199g", "/m/01bjv", "/m/07r04", "/m/0bt9lr", "/m/0pg52")  # never drawn
# Relative to the image's size; 94 % of the real masks have another size than their image.
_MASK_SCALES = (1600 / 1024, 1.0, 0.75)
_MASK_SCALE_ODDS = (0.85, 0.06, 0.09)


@dataclass(frozen=True)
class SceneConfig:
    """What to draw. A scene depends only on its seed, split and index and on the fields after `seed`.

    Attributes:
        train, validation, test: number of images in each split.
        seed: any integer >= 0.
        long_side: length of an image's longer side in pixels, >= 96; the shorter one is 3/4 or 2/3 of it.
        portrait_fraction: share of images in portrait format.
        unmasked_fraction: share of the training objects that have a box and no mask. In validation and test every
            object has a mask, for a correct average precision (crowds never have one).
        group_fraction: share of scenes with a crowd in one group-of box.
        quality: of the JPEGs, 1 to 95.
    """

    train: int = 200
    validation: int = 40
    test: int = 20
    seed: int = 0
    long_side: int = 256
    portrait_fraction: float = 0.2
    unmasked_fraction: float = 0.3
    group_fraction: float = 0.08
    quality: int = 90

    def __post_init__(self) -> None:
        for name in (*SPLITS, "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"SceneConfig: {name} is {getattr(self, name)}; give 0 or more")
        for name in ("portrait_fraction", "unmasked_fraction", "group_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"SceneConfig: {name} is {getattr(self, name)}; give a number from 0 to 1")
        if self.long_side < 96:
            raise ValueError(f"SceneConfig: long_side is {self.long_side}; give 96 or more pixels")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"SceneConfig: quality is {self.quality}; give 1 to 95")


@dataclass(frozen=True)
class SplitTruth:
    """The contents of one split.

    Attributes:
        sizes: ImageID -> (width, height) in pixels, in the order of the indices.
        boxes, masks: number of boxes and masks per class name, without crowds.
        group_boxes: number of crowds.
    """

    sizes: dict[str, tuple[int, int]]
    boxes: dict[str, int]
    masks: dict[str, int]
    group_boxes: int

    @property
    def image_ids(self) -> tuple[str, ...]:
        """Image `index` of the split is `image_ids[index]`."""
        return tuple(self.sizes)


@dataclass(frozen=True)
class SceneTruth:
    """What was written: the roots of images and annotations, and the splits by name."""

    images: Path
    annotations: Path
    splits: dict[str, SplitTruth]


def image_id(config: SceneConfig, split: str, index: int) -> str:
    """Return the ImageID of a scene: 16 hex digits."""
    return hashlib.sha256(f"{config.seed}/{split}/{index}".encode()).hexdigest()[:16]


def scene_of(config: SceneConfig, split: str, index: int) -> Scene:
    """Draw scene `index` of a split: the picture before JPEG, and full masks.

    Raises:
        ValueError: an unknown split.
    """
    rng = _rng(config, split, index, 0)
    short = round(config.long_side * (3 / 4 if rng.random() < 0.6 else 2 / 3))
    size = (config.long_side, short)
    return draw_scene(rng, *(size[::-1] if rng.random() < config.portrait_fraction else size), config.group_fraction)


def write_open_images(out_dir: str | Path, config: SceneConfig | None = None, processes: int = 1) -> SceneTruth:
    """Draw every scene of `config` (default: `SceneConfig()`) and write the whole layout under `out_dir`.

    The files have the same bytes for any number of `processes` (with the same Pillow and zlib).
    """
    config = config or SceneConfig()
    out = Path(out_dir)
    images, annotations = out / "open-images-dataset", out / "openimages"
    write_classes(annotations)
    splits = {}
    with _mapper(processes) as run:
        for split in SPLITS:
            folder = images / split
            folder.mkdir(parents=True, exist_ok=True)
            records = list(run(partial(_write_image, config, split, folder), range(getattr(config, split))))
            write_split(annotations, split, sorted(records, key=lambda record: record.image_id))
            splits[split] = _truth(records)
    return SceneTruth(images, annotations, splits)


@contextmanager
def _mapper(processes: int) -> Iterator[partial[Iterator[ImageRecord]]]:
    """Return an ordered `map` that uses this process or several."""
    if processes <= 1:
        yield partial(map)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=8)


def _rng(config: SceneConfig, split: str, index: int, stream: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"scenes: no split {split!r}; give one of {', '.join(SPLITS)}")
    return np.random.default_rng((config.seed, SPLITS.index(split), index, stream))


def _write_image(config: SceneConfig, split: str, folder: Path, index: int) -> ImageRecord:
    """Draw one scene, write its JPEG, and return its annotations."""
    scene = scene_of(config, split, index)
    name = image_id(config, split, index)
    rng = _rng(config, split, index, 1)
    data = _jpeg(scene.image, config.quality, turned=index % 16 == 9)
    (folder / f"{name}.jpg").write_bytes(data)
    height, width = scene.image.shape[:2]
    mask_size = _mask_size(width, height, float(rng.choice(_MASK_SCALES, p=_MASK_SCALE_ODDS)))
    without = config.unmasked_fraction if split == "train" else 0.0
    first = int(hashlib.sha256(f"boxes/{name}".encode()).hexdigest()[:8], 16)
    rows = tuple(
        # An odd step keeps the BoxIDs of an image distinct.
        _row(thing, mask_size, f"{(first + place * 0x9E3779B1) % 2**32:08x}", bool(rng.random() < without), rng)
        for place, thing in enumerate(scene.objects)
    )
    present, absent = _verified(scene, rng)
    return ImageRecord(name, width, height, rows, present, absent, _metadata(name, split, index, data))


def _row(thing: SceneObject, size: tuple[int, int], box_id: str, unmasked: bool, rng: np.random.Generator) -> BoxRow:
    height, width = thing.mask.shape
    left, top, right, bottom = thing.box
    mask = thing.mask
    across, down = np.flatnonzero(mask[top]), np.flatnonzero(mask[bottom - 1])
    extremes = (
        (left / width, (int(np.flatnonzero(mask[:, left])[0]) + 0.5) / height),
        ((int(across[0]) + 0.5) / width, top / height),
        (right / width, (int(np.flatnonzero(mask[:, right - 1])[0]) + 0.5) / height),
        ((int(down[0]) + 0.5) / width, bottom / height),
    )
    inside = np.argwhere(mask)[rng.integers(0, np.count_nonzero(mask), int(rng.integers(1, 4)))]
    return BoxRow(
        label=thing.label_mid,
        box=(left / width, top / height, right / width, bottom / height),
        extremes=extremes,
        is_occluded=thing.is_occluded,
        is_truncated=thing.is_truncated,
        is_group_of=thing.is_group_of,
        box_id=box_id,
        mask_png=None if unmasked or thing.is_group_of else _mask_png(mask, size),
        predicted_iou=float(rng.uniform(0.7, 0.95)),
        clicks=tuple(((x + 0.5) / width, (y + 0.5) / height, 1) for y, x in inside.tolist()),
    )


def _verified(scene: Scene, rng: np.random.Generator) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes that are verified as present, and as absent; the others are unknown."""
    present = {thing.label_mid for thing in scene.objects}
    seen = present | set(scene.slivers)
    kin = {MIDS[parent] for child, parent in _PARENTS.items() if MIDS[child] in seen} | seen
    # Absent only if certain: neither the class nor a descendant nor an ancestor was drawn.
    candidates = [
        mid for name, mid in MIDS.items() if mid not in kin and MIDS.get(_PARENTS.get(name, ""), "") not in seen
    ]
    absent = [mid for mid in candidates if rng.random() < 0.85]
    absent += [mid for mid in _ABSENT_SOMETIMES if rng.random() < 0.4]
    return tuple(sorted(present)), tuple(sorted(absent))


def _metadata(name: str, split: str, index: int, jpeg: bytes) -> tuple[str, ...]:
    """Return a row of images-with-rotation.csv. Rotation is for viewers; no file is rotated."""
    rotation = (90.0, 180.0, 270.0)[index // 16 % 3] if index % 16 == 5 else 0.0
    title = 'Corner of 5th, "Main" and Elm' if index % 4 == 0 else f"Street {index}"
    site = f"https://pictures.example/{name}"
    return (
        name,
        split,
        f"{site}_o.jpg",
        site,
        "https://creativecommons.org/licenses/by/2.0/",
        f"https://pictures.example/people/{index % 7}/",
        f"Draughtsperson {index % 7}",
        title,
        str(len(jpeg)),
        base64.b64encode(hashlib.md5(jpeg, usedforsecurity=False).digest()).decode(),
        f"{site}_z.jpg" if index % 3 else "",
        str(rotation),
    )


def _jpeg(image: NDArray[np.uint8], quality: int, turned: bool) -> bytes:
    """Encode a JPEG; `turned` adds an EXIF orientation, which decoders must ignore, as the boxes do."""
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, exif=exif)
    return buffer.getvalue()


def _mask_size(width: int, height: int, scale: float) -> tuple[int, int]:
    return round(width * scale), round(height * scale)


def _mask_png(mask: NDArray[np.bool_], size: tuple[int, int]) -> bytes:
    """Return a 1-bit PNG of the mask, resized by nearest neighbour to (width, height)."""
    buffer = io.BytesIO()
    Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def _truth(records: list[ImageRecord]) -> SplitTruth:
    names = {mid: name for name, mid in MIDS.items()}
    single = [row for record in records for row in record.boxes if not row.is_group_of]
    return SplitTruth(
        sizes={record.image_id: (record.width, record.height) for record in records},
        boxes=dict(Counter(names[row.label] for row in single)),
        masks=dict(Counter(names[row.label] for row in single if row.mask_png is not None)),
        group_boxes=sum(row.is_group_of for record in records for row in record.boxes),
    )
