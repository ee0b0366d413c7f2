"""From samples to batches: the callables that a `ShardStream` runs in its loader processes.

The random numbers of a sample are seeded with (seed, epoch, image id) and nothing else: a batch is the same whichever
worker and rank makes it. A sample is augmented alike at any position in the batch, except by copy-paste, which takes
objects from the next sample, and by mosaic, which takes the next three images.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shards.common.errors import SampleError
from shards.format.image import STORED, ImageError, pillow_errors, rgb
from shards.format.sample import Sample
from shards.stream.sample_cache import SampleCache
from trainer.config.settings import DataConfig
from trainer.data import augment
from trainer.data.affine import matrix_of, random_turn, warp
from trainer.data.copy_paste import paste_some
from trainer.data.instances import Batch, Instances, padded, read_instances
from trainer.data.iou_crop import Window, crop, draw_window
from trainer.data.mosaic import TILES, mosaic

# Of images outside of a dataset, whose images are JPEGs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

Prepared = tuple[Tensor, Instances]  # an image, uint8 [3, h, w], as the network sees it


@dataclass(frozen=True)
class EvalBatch:
    """The input of one evaluation step.

    Attributes:
        images: uint8 [3, H, W] RGB each, at the stored size.
        samples: their annotations; `image` is empty.
    """

    images: list[Tensor]
    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def pin_memory(self) -> EvalBatch:
        """Copy the images into page-locked memory, from which they are copied to a GPU asynchronously."""
        return replace(self, images=[image.pin_memory() for image in self.images])


class TrainCollate:
    """Decode, resize, augment and pad samples to a training `Batch`.

    Args:
        data: sizes and augmentation.
        seed: of the augmentation.
        classes: of the network, with the background.
        predictions: whether predicted masks are used; otherwise their objects are ones with a box only.
    """

    def __init__(self, data: DataConfig, seed: int, classes: int, *, predictions: bool = True) -> None:
        self.data = data
        self.seed = seed
        self.classes = classes
        self.predictions = predictions

    def __call__(self, samples: Sequence[Sample], epoch: int) -> Batch:
        """Make a batch of samples for an epoch.

        Raises:
            SampleError: an image cannot be decoded, or has another size than its sample says; or a class is none of the
                dataset's.
        """
        data = self.data
        if not self.predictions:
            samples = [sample.without_predictions() for sample in samples]
        for sample in samples:
            check_classes(sample, self.classes)
        rngs = [sample_rng(self.seed, epoch, sample.image_id) for sample in samples]
        min_sizes = [int(rng.choice(data.min_sizes or [data.min_size])) for rng in rngs]
        windows = [self._window(sample, rng) for sample, rng in zip(samples, rngs)]
        sizes = [
            augment.scaled_size(window.height, window.width, min_size, data.max_size)
            for window, min_size in zip(windows, min_sizes)
        ]
        images = augment.empty_images(len(samples), *augment.padded_size(data, sizes))
        prepared = []
        # One after the other: an image is copied into its slot while it is still in the processor's cache.
        for sample, window, size, rng, slot in zip(samples, windows, sizes, rngs, images):
            image, of_image = self._prepare(sample, window, size, rng)
            prepared.append((augment.pad_into(image, slot), of_image))
        tiles = torch.tensor([[[0.0, 0.0, image.shape[-1], image.shape[-2]]] for image, _ in prepared])  # [B, 1, 4]
        owners = torch.arange(len(samples))[:, None]  # [B, 1], the sample of each tile
        if data.mosaic:
            prepared, tiles, owners = self._mosaics(prepared, tiles, owners, rngs)
        if data.copy_paste:
            donors = prepared[1:] + prepared[:1]
            prepared = [
                paste_some(*target, *donor, data.copy_paste, rng) for target, donor, rng in zip(prepared, donors, rngs)
            ]
        if data.mosaic or data.copy_paste:
            prepared = [(augment.pad_into(image, slot), of_image) for (image, of_image), slot in zip(prepared, images)]
        instances = [of_image for _, of_image in prepared]
        if data.max_instances:
            instances = [of_image.cap(data.max_instances, rng) for of_image, rng in zip(instances, rngs)]
        return Batch(
            images=images,
            sizes=torch.tensor([image.shape[-2:] for image, _ in prepared]),
            image_ids=tuple(sample.image_id for sample in samples),
            tiles=tiles,
            verified=torch.stack([verified_classes(sample, self.classes) for sample in samples])[owners],
            **padded(instances),
        )

    def _mosaics(
        self, prepared: Sequence[Prepared], tiles: Tensor, owners: Tensor, rngs: Sequence[np.random.Generator]
    ) -> tuple[list[Prepared], Tensor, Tensor]:
        """Replace some images by a mosaic of themselves and the next three of the batch.

        Returns the images, and the tiles, [B, TILES, 4], with the sample of each, int64 [B, TILES].
        """
        found, tiles, owners = list(prepared), tiles.repeat(1, TILES, 1), owners.repeat(1, TILES)
        for i, rng in enumerate(rngs):
            if rng.random() < self.data.mosaic:
                owners[i] = (i + torch.arange(TILES)) % len(prepared)
                height, width = prepared[i][0].shape[-2:]
                if self.data.resize == "scale_jitter":
                    height = width = self.data.max_size
                parts = [prepared[k] for k in owners[i].tolist()]
                image, of_image, tiles[i] = mosaic(parts, height, width, rng)
                found[i] = image, of_image
        return found, tiles, owners

    def _window(self, sample: Sample, rng: np.random.Generator) -> Window:
        """Return the part of the stored image that is used."""
        if self.data.iou_crop and rng.random() < self.data.iou_crop:
            objects = [instance.bbox for instance in sample.instances if not instance.is_group_of]
            boxes = np.array(objects, dtype=np.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            return draw_window(sample.height, sample.width, boxes, rng)
        return Window(0, 0, sample.width, sample.height)

    def _prepare(
        self, sample: Sample, window: Window, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[Tensor, Instances]:
        data, image, instances = self.data, decode_sample(sample), read_instances(sample.instances)
        if data.iou_crop:
            image, instances = crop(image, instances, window)
        # The flip comes first because most images are smaller before resizing than after.
        if rng.random() < data.flip:
            image, instances = augment.flip(image, instances)
        height, width = image.shape[-2:]
        view = augment.View.whole(size)
        if data.resize == "scale_jitter":
            view = augment.jittered(height, width, data.max_size, data.scale_range, rng)
        if data.rotate or data.shear or data.translate:
            matrix = random_turn(data, view.height, view.width, rng) @ matrix_of(view, height, width)
            image, instances = warp(image, instances, matrix, view.height, view.width)
        else:
            image, instances = view.of(image, instances)
        if data.photometric:
            image = augment.photometric(image, data.photometric, rng)
        return image, instances


class EvalCollate:
    """Decode samples to an `EvalBatch`; the network resizes. `classes` as of `TrainCollate`."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, samples: Sequence[Sample], epoch: int) -> EvalBatch:
        """Make a batch of samples; `epoch` is not used. Errors are those of `TrainCollate`."""
        for sample in samples:
            check_classes(sample, self.classes)
        images = [decode_sample(sample) for sample in samples]
        return EvalBatch(images, [replace(sample, image=b"") for sample in samples])


def sample_rng(seed: int, epoch: int, image_id: str) -> np.random.Generator:
    """Return the random number generator of one sample in one epoch."""
    digest = hashlib.blake2b(image_id.encode("utf-8"), digest_size=8).digest()
    return np.random.default_rng([seed, epoch, int.from_bytes(digest, "little")])


def check_classes(sample: Sample, classes: int) -> None:
    """Raise a SampleError for a category id of a sample that is not one of the network's, 1 to `classes` - 1."""
    ids = {instance.category_id for instance in sample.instances}
    for number in sorted(ids.union(sample.verified_present, sample.verified_absent, sample.not_exhaustive)):
        if not 0 < number < classes:
            name = f"sample {sample.image_id}: category id {number}"
            raise SampleError(f"{name} is not one of 1 to {classes - 1}: build the dataset again")


def verified_classes(sample: Sample, classes: int) -> Tensor:
    """Return the classes whose annotations in a sample are complete, bool [classes]; the background, 0, is one.

    These are the verified present, the verified absent, and the classes with a box, without those that are not
    annotated exhaustively. A sample without either list comes from a source without verified labels, whose annotations
    are taken as complete.
    """
    known = {*sample.verified_present, *sample.verified_absent}
    if known:
        known |= {0, *(instance.category_id for instance in sample.instances)}
    else:
        known = set(range(classes))
    verified = torch.zeros(classes, dtype=torch.bool)
    verified[list(known.difference(sample.not_exhaustive))] = True
    return verified


def decode_sample(sample: Sample) -> Tensor:
    """Decode the image of a sample to uint8 [3, H, W] RGB. Errors are those of `TrainCollate`."""
    try:
        image = decode_image(sample.image, STORED)
    except SampleError as error:
        raise SampleError(f"sample {sample.image_id}: {error}") from error
    height, width = image.shape[-2:]
    if (height, width) != (sample.height, sample.width):
        raise SampleError(
            f"sample {sample.image_id}: the image is {width}x{height}, but its annotations are for "
            f"{sample.width}x{sample.height}: build the dataset again"
        )
    return image


def decode_image(data: bytes, formats: tuple[str, ...] = ("JPEG",)) -> Tensor:
    """Decode an image of one of some formats, by Pillow's names; of no other, because some start other programs.

    EXIF orientation is ignored, because annotations refer to the pixels as stored; see `shards.format.image.rgb` for
    other modes. The pixels of every JPEG are those of Pillow.

    Returns:
        uint8 [3, H, W] RGB, a view of H x W x 3 memory.

    Raises:
        SampleError: the data is not an image, is truncated, or has 32 bits per channel.
    """
    pixels = _ordinary_jpeg(data)
    if pixels is None:
        try:
            wanted = f"one of {', '.join(formats)}" if len(formats) > 1 else f"a {formats[0]}"
            with pillow_errors(wanted), Image.open(io.BytesIO(data), formats=formats) as image:
                pixels = rgb(image)
        except ImageError as error:
            raise SampleError(f"an image of {len(data)} bytes cannot be decoded: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _ordinary_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Decode a JPEG to uint8 [H, W, 3] RGB as Pillow does, in less time.

    Both use libjpeg-turbo with the same settings; the difference is what Pillow copies. None for anything but an
    undamaged JPEG in grey or YCbCr within Pillow's limit of pixels: Pillow decodes it or says what is wrong.
    """
    try:
        import simplejpeg
    except ImportError:  # `benchmarks/gpu.py` needs few packages
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("Gray", "YCbCr") or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return pixels


def sample_cache(data: DataConfig) -> SampleCache | None:
    """Open the cache that `cache_dir` and `cache_mb` describe; None without `cache_dir`."""
    return SampleCache(data.cache_dir, data.cache_mb * 2**20) if data.cache_dir else None
