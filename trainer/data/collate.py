"""Bytes to batches: the callables that a `ShardStream` runs in its loader processes.

The random numbers of a sample are folded from (seed, epoch, image id) and nothing else: a batch is the same whichever
worker and rank makes it, and (but for copy-paste, which takes from the next sample) wherever in it the sample stands.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from shards.common.errors import SampleError
from shards.format.sample import Sample
from trainer.config.settings import DataConfig
from trainer.data import augment
from trainer.data import instances as geometry
from trainer.data.copy_paste import paste_some
from trainer.data.instances import Batch, Instances, read_instances

if TYPE_CHECKING:
    from shards.stream.sample_cache import SampleCache


@dataclass(frozen=True)
class EvalBatch:
    """What evaluation takes.

    Attributes:
        images: uint8 [3, H, W] RGB each, at the stored size.
        samples: their annotations; `image` is empty.
    """

    images: list[Tensor]
    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)


class TrainCollate:
    """Samples to a training `Batch`: decoded, resized, varied, padded.

    Args:
        data: the settings, from `resize` on.
        seed: of the augmentation.
    """

    def __init__(self, data: DataConfig, seed: int) -> None:
        self.data = data
        self.seed = seed

    def __call__(self, samples: Sequence[Sample], epoch: int) -> Batch:
        """
        Raises:
            SampleError: an image that cannot be decoded, or has another size than its sample says.
        """
        rngs = [sample_rng(self.seed, epoch, sample.image_id) for sample in samples]
        min_sizes = [int(rng.choice(self.data.min_sizes or [self.data.min_size])) for rng in rngs]
        images = augment.blank(len(samples), *self._room(samples, min_sizes))
        prepared = []
        # One after the other: an image is put into its place while the processor's cache still holds it.
        for sample, min_size, rng, room in zip(samples, min_sizes, rngs, images):
            image, of_image = self._prepare(sample, min_size, rng)
            prepared.append((augment.place(image, room), of_image))
        if self.data.copy_paste:
            donors = prepared[1:] + prepared[:1]
            prepared = [
                paste_some(*taker, *donor, self.data.copy_paste, rng)
                for taker, donor, rng in zip(prepared, donors, rngs)
            ]
            prepared = [(augment.place(image, room), of_image) for (image, of_image), room in zip(prepared, images)]
        instances = [of_image for _, of_image in prepared]
        if self.data.max_instances:
            instances = [geometry.cap(one, self.data.max_instances, rng) for one, rng in zip(instances, rngs)]
        flat = {item.name: torch.cat([getattr(one, item.name) for one in instances]) for item in fields(Instances)}
        return Batch(
            images=images,
            sizes=torch.tensor([image.shape[-2:] for image, _ in prepared]),
            counts=torch.tensor([len(one) for one in instances]),
            image_ids=tuple(sample.image_id for sample in samples),
            verified=tuple(verified_classes(sample) for sample in samples),
            **flat,
        )

    def _room(self, samples: Sequence[Sample], min_sizes: Sequence[int]) -> tuple[int, int]:
        """Height and width that hold every image."""
        if self.data.resize != "shortest":
            return self.data.max_size, self.data.max_size
        sizes = [
            augment.scaled_size(sample.height, sample.width, min_size, self.data.max_size)
            for sample, min_size in zip(samples, min_sizes)
        ]
        return max(height for height, _ in sizes), max(width for _, width in sizes)

    def _prepare(self, sample: Sample, min_size: int, rng: np.random.Generator) -> tuple[Tensor, Instances]:
        data, image, instances = self.data, decode_sample(sample), read_instances(sample.instances)
        # First, because mostly the image is smaller before it is resized than after.
        if rng.random() < data.flip:
            image, instances = augment.flip(image, instances)
        if data.resize == "scale_jitter":
            low, high = data.scale_range
            image, instances = augment.scale_jitter(image, instances, data.max_size, (low, high), rng)
        else:
            image, instances = augment.resize(image, instances, min_size, data.max_size)
        if data.photometric:
            image = augment.photometric(image, data.photometric, rng)
        return image, augment.clip(image, instances)


class EvalCollate:
    """Samples to an `EvalBatch`: decoded, nothing else; the network resizes."""

    def __call__(self, samples: Sequence[Sample], epoch: int) -> EvalBatch:
        """
        Raises:
            SampleError: as `TrainCollate`.
        """
        images = [decode_sample(sample) for sample in samples]
        return EvalBatch(images, [replace(sample, image=b"") for sample in samples])


def sample_rng(seed: int, epoch: int, image_id: str) -> np.random.Generator:
    """The random numbers of one sample in one epoch."""
    digest = hashlib.blake2b(image_id.encode("utf-8"), digest_size=8).digest()
    return np.random.default_rng([seed, epoch, int.from_bytes(digest, "little")])


def verified_classes(sample: Sample) -> tuple[int, ...] | None:
    """Ids of the classes of which a sample tells whether and where they are, ascending; None for all of them.

    Those are the verified present, the verified absent, and those with a box. A sample that has neither list comes from
    a source without verified labels, whose annotations are taken as complete.
    """
    if not sample.verified_present and not sample.verified_absent:
        return None
    boxed = (instance.category_id for instance in sample.instances)
    return tuple(sorted({*sample.verified_present, *sample.verified_absent, *boxed}))


def decode_sample(sample: Sample) -> Tensor:
    """The image of a sample, uint8 [3, H, W] RGB.

    Raises:
        SampleError: it cannot be decoded, or has another size than the sample says.
    """
    try:
        image = decode_image(sample.image)
    except SampleError as error:
        raise SampleError(f"sample {sample.image_id}: {error}") from error
    height, width = image.shape[-2:]
    if (height, width) != (sample.height, sample.width):
        raise SampleError(
            f"sample {sample.image_id}: the JPEG is {width}x{height}, its annotations are for "
            f"{sample.width}x{sample.height}: build the dataset again"
        )
    return image


def decode_image(data: bytes) -> Tensor:
    """Decode a JPEG, PNG or any other format that Pillow knows.

    EXIF orientation is ignored: the annotations are for the pixels as stored. Of 16 bits a channel the upper eight are
    taken. By Pillow, because torchvision's own decoder, which takes 3 ms instead of 4 for a megapixel, is deprecated
    and will be removed.

    Returns:
        uint8 [3, H, W] RGB, a view of H x W x 3 memory.

    Raises:
        SampleError: not an image, a truncated one, or one of 32-bit numbers.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = _rgb(image, len(data))
    except UnidentifiedImageError as error:  # its text names a buffer of ours
        known = "it is of no format that Pillow knows"
        raise SampleError(f"an image of {len(data)} bytes cannot be decoded: {known}") from error
    # Pillow has no error of its own for the rest: which of these a broken file ends in depends on the format.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise SampleError(f"an image of {len(data)} bytes cannot be decoded: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rgb(image: Image.Image, nbytes: int) -> NDArray[np.uint8]:
    """The pixels of an image of any mode, uint8 [H, W, 3].

    Raises:
        SampleError: numbers of 32 bits, whose black and white no format tells.
    """
    # Pillow reads PNG and PGM of 16-bit grey as `I;16` or `I`, by its version, and cuts them off at 255 in `convert`.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image) >> 8).astype(np.uint8)  # as Pillow itself does with 16-bit colours
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise SampleError(
            f"an image of {nbytes} bytes has 32-bit {kind}, of which nothing tells black and white: "
            "save it with 8 bits, as a PNG for example"
        )
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def sample_cache(data: DataConfig) -> SampleCache | None:
    """The cache that `cache_dir` and `cache_mb` ask for.

    Raises:
        StorageError: the folder cannot be used.
    """
    if not data.cache_dir:
        return None
    from shards.stream.sample_cache import SampleCache

    return SampleCache(data.cache_dir, data.cache_mb * 2**20)
