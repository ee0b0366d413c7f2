"""What benchmarks of training compare: drawn samples, one network, and torchvision's way to its losses."""

from __future__ import annotations

import argparse
import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.transforms import v2

from shards.format import rle
from shards.format.sample import Instance, Sample
from trainer.config.settings import DataConfig, ModelConfig
from trainer.data.collate import decode_image
from trainer.model.build import build_model

WIDTH, HEIGHT = 1024, 768
CLASSES = 5  # with the background


@functools.cache
def draw(objects: int, number: int, width: int = WIDTH, height: int = HEIGHT) -> Sample:
    """Draw a smooth picture with ellipses that are 24 to 300 pixels wide and high, or less in small pictures."""
    rng = np.random.default_rng([objects, number])
    small = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    ys, xs = np.mgrid[:height, :width] + 0.5
    instances = []
    for _ in range(objects):
        h, w = np.minimum(np.exp(rng.uniform(np.log(24), np.log(300), 2)), (height, width))
        y, x = rng.uniform(h / 2, height - h / 2), rng.uniform(w / 2, width - w / 2)
        mask = rle.encode(((((ys - y) / h * 2) ** 2 + ((xs - x) / w * 2) ** 2) <= 1).astype(np.uint8))
        instances.append(Instance(int(rng.integers(1, CLASSES)), rle.bounds(mask), mask))
    return Sample(f"{objects}-{number}", file.getvalue(), width, height, tuple(instances))


def settings(options: argparse.Namespace, flip: float = 0.5) -> DataConfig:
    """Return the data settings of both sides."""
    return DataConfig(
        resize="shortest", min_size=options.max_size * 3 // 4, max_size=options.max_size, flip=flip, max_instances=0
    )


def network_of(options: argparse.Namespace) -> MaskRCNN:
    """Build the network, with the same random weights in every process."""
    torch.manual_seed(0)
    model = ModelConfig(backbone=options.backbone, weights="none")
    return build_model(model, settings(options), CLASSES).train().to(options.device)


def stock_load(samples: Sequence[Sample], flip: float) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Make the input of torchvision's model as its reference scripts do (references/detection, presets with hflip)."""
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    images, targets = [], []
    for sample in samples:
        boxes = np.array([i.bbox for i in sample.instances], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        image, target = transform(
            tv_tensors.Image(decode_image(sample.image)),
            {
                "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(sample.height, sample.width)),
                "labels": torch.tensor([i.category_id for i in sample.instances]),
                "masks": tv_tensors.Mask(full_size(sample)),
            },
        )
        images.append(image)
        targets.append(target)
    return images, targets


def full_size(sample: Sample) -> np.ndarray:
    """Decode the masks of a sample with pycocotools: uint8 [M, H, W]."""
    return np.stack([rle.decode(i.segmentation) for i in sample.instances if i.segmentation is not None])


def stock_resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks as torchvision's GeneralizedRCNNTransform: uint8 [M, h, w]."""
    return F.interpolate(masks[:, None].float(), size=size)[:, 0].byte()


def stock_losses(network: MaskRCNN, loaded: Any, device: str) -> dict[str, Tensor]:
    """Compute torchvision's losses of what `stock_load` returned."""
    images, targets = loaded
    moved = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]
    losses: dict[str, Tensor] = network([image.to(device, non_blocking=True) for image in images], moved)
    return losses
