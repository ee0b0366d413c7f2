"""A split as a map-style torch dataset, for torchvision's reference detection scripts.

Targets are those of torchvision's `wrap_dataset_for_transforms_v2(CocoDetection(...))` with the keys of
`references/detection/coco_utils.py`: https://github.com/pytorch/vision/tree/main/references/detection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torchvision import tv_tensors

from shards.export.export import image_numbers, read
from shards.format import rle
from shards.format.sample import Instance, Sample
from shards.stream.reader import SampleReader

if TYPE_CHECKING:
    from shards.format.dataset import Dataset

Target = dict[str, Any]
Transforms = Callable[[Any, Target], tuple[Any, Target]]


class TorchvisionDataset(TorchDataset[tuple[Any, Target]]):
    """What `Dataset.to_torchvision` returns; `image_ids` are the keys of the N samples, Arrow strings."""

    def __init__(
        self, dataset: Dataset, split: str, transforms: Transforms | None, keep_unmasked: bool, keep_groups: bool
    ) -> None:
        index = replace(dataset.index(split), labels=None)  # which loader processes do not need
        self.image_ids = index.image_ids
        self.transforms, self.keep_unmasked, self.keep_groups = transforms, keep_unmasked, keep_groups
        self._reader, self._numbers = SampleReader(dataset.root, index), image_numbers(index)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row: int) -> tuple[Any, Target]:
        row = range(len(self))[row]
        [(_, sample)] = read(self._reader, range(row, row + 1))
        kept = [instance for instance in sample.instances if self._is_kept(instance)]
        image, target = sample.picture(), make_target(sample, kept, int(self._numbers[row]))
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def _is_kept(self, instance: Instance) -> bool:
        if instance.is_group_of and not self.keep_groups:
            return False
        return instance.segmentation is not None or self.keep_unmasked


def make_target(sample: Sample, instances: list[Instance], image_id: int) -> Target:
    """Return the target of N of a sample's objects, without those whose box has no extent inside the image."""
    size = (sample.height, sample.width)
    found = np.array([instance.bbox for instance in instances], np.float32).reshape(-1, 4)
    found[:, 2:] += found[:, :2]
    boxes = found.clip(0, np.array((sample.width, sample.height) * 2, np.float32))
    rows = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    kept = [instances[row] for row in rows]
    masks = np.zeros((len(kept), *size), np.uint8)
    for mask, instance in zip(masks, kept, strict=True):
        if instance.segmentation is not None:
            mask[:] = rle.decode(instance.segmentation)
    return {
        "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes[rows]), format="XYXY", canvas_size=size),
        "labels": torch.tensor([instance.category_id for instance in kept], dtype=torch.int64),
        "masks": tv_tensors.Mask(torch.from_numpy(masks)),
        "image_id": image_id,
        "area": torch.tensor([instance.coco_area() for instance in kept], dtype=torch.float32),
        "iscrowd": torch.tensor([instance.is_group_of for instance in kept], dtype=torch.int64),
    }
