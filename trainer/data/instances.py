"""The annotated objects of one image (`Instances`) and of a batch (`Batch`) as flat tensors, with masks as bitmaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area

from shards.format.sample import Instance
from trainer.data.mask_bitmaps import BITMAP, is_inside, rasterise

# Bits of `flags`.
HAS_MASK = 1
GROUP_OF = 2
IGNORED = 4  # neither an object to learn from nor background
LOOSE = 8  # without a mask of the source, and may not reach all sides of its box, or not be what its colours show
PREDICTED = 16  # with HAS_MASK: a mask that a run predicted

PIXEL = (0.0, 0.0, 1.0, 1.0)  # the box of rows that are not used
MIN_ROWS = 8  # of a batch's annotations per image
KEPT = 0.8  # share of a box that must stay in view, for the object to reach the sides of what is left
MIN_SIDE = 1.0  # boxes with a shorter side, in pixels, are dropped after resizing and cropping


@dataclass(frozen=True)
class Instances:
    """The annotated objects of one image.

    Attributes:
        boxes: float32 [M, 4] x0, y0, x1, y1 in pixels.
        labels: int64 [M] category ids, 1..C.
        flags: uint8 [M] HAS_MASK, GROUP_OF, IGNORED, LOOSE and PREDICTED.
        bitmaps: uint8 [M, BITMAP, BITMAP] 0..255, the share of each cell that the object covers; zeros without a mask.
        frames: float32 [M, 4] x0, y0, x1, y1 of the bitmap in pixels of the image; zeros without a mask.
    """

    boxes: Tensor
    labels: Tensor
    flags: Tensor
    bitmaps: Tensor
    frames: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def concatenate(parts: Sequence[Instances]) -> Instances:
        """Join the instances of several parts in their order; at least one part."""
        return Instances(**{item.name: torch.cat([getattr(p, item.name) for p in parts]) for item in fields(Instances)})

    def select(self, index: Tensor) -> Instances:
        """Return the instances at `index`, bool [M] or int64 [K]."""
        return Instances(**{item.name: getattr(self, item.name)[index] for item in fields(self)})

    def flip(self, width: float) -> Instances:
        """Mirror left and right in an image of `width` pixels."""
        boxes, frames = _mirror(self.boxes, width), _mirror(self.frames, width)
        return replace(self, boxes=boxes, frames=frames, bitmaps=self.bitmaps.flip(-1))

    def scale(self, x: float, y: float) -> Instances:
        """Resize by a horizontal and a vertical factor."""
        factors = torch.tensor([x, y, x, y])
        return replace(self, boxes=self.boxes * factors, frames=self.frames * factors)

    def shift(self, x: float, y: float) -> Instances:
        """Move to the right by x and down by y pixels."""
        move = torch.tensor([x, y, x, y])
        return replace(self, boxes=self.boxes + move, frames=self.frames + move)

    def crop(self, x: float, y: float, width: float, height: float) -> Instances:
        """Move to the coordinates of a window at x, y of the image, and clip to it.

        Boxes are clipped, and dropped where a side is left with less than MIN_SIDE pixels. Bitmaps keep their cells
        outside the window: a RoI is inside, or its mask ends at the box; see `without_outside`.
        """
        moved = self.shift(-x, -y)
        boxes = moved.boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        is_cut = box_area(boxes) < KEPT * box_area(self.boxes)
        return replace(moved, boxes=boxes).loosened(is_cut).select(is_large(boxes))

    def without_outside(self, height: float, width: float) -> Instances:
        """Clear the cells of bitmaps outside of an image, before other pixels are placed next to it.

        Cells within a pixel of the image stay, because a RoI at its border reads that far.
        """
        return replace(self, bitmaps=self.bitmaps * is_inside(self.bitmaps, self.frames, height, width, margin=1.0))

    def loosened(self, which: Tensor) -> Instances:
        """Mark the instances `which`, bool [M] or [], as LOOSE, if they are objects without a mask of the source."""
        no_source = (self.flags == 0) | (self.flags == HAS_MASK | PREDICTED)
        return replace(self, flags=torch.where(which & no_source, self.flags | LOOSE, self.flags))

    def cap(self, limit: int, rng: np.random.Generator) -> Instances:
        """Mark all but a random choice of `limit` objects as IGNORED; group-of regions do not count.

        The choice is random and differs between epochs, because choosing the largest would never teach small objects.
        """
        objects = np.flatnonzero((self.flags & (GROUP_OF | IGNORED)).numpy() == 0)
        if len(objects) <= limit:
            return self
        flags = self.flags.clone()
        flags[torch.from_numpy(rng.permutation(objects)[limit:])] |= IGNORED
        return replace(self, flags=flags)


@dataclass(frozen=True)
class Batch:
    """The input of one training step, which crosses the worker boundary as a few tensors.

    The annotations of an image are its first rows; the rest, up to G, is padding.

    Attributes:
        images: uint8 [B, 3, H, W] RGB, padded right and bottom with zeros.
        sizes: int64 [B, 2] (height, width) of each image inside the padding.
        boxes: float32 [B, G, 4] x0, y0, x1, y1 in pixels of the resized image, inside it; one pixel in padding.
        labels: int64 [B, G] category ids, 1..C; 0 in padding.
        flags: uint8 [B, G] as in `Instances`; 0 in padding.
        bitmaps: uint8 [B, G, BITMAP, BITMAP] as in `Instances`.
        frames: float32 [B, G, 4] as in `Instances`; one pixel without a mask.
        tiles: float32 [B, T, 4] x0, y0, x1, y1 of the parts of each image: itself, or those of a mosaic.
        verified: bool [B, T, C + 1] classes whose annotations are complete in the tile; the background, 0, is one.
        image_ids: the B keys.
    """

    images: Tensor
    sizes: Tensor
    boxes: Tensor
    labels: Tensor
    flags: Tensor
    bitmaps: Tensor
    frames: Tensor
    tiles: Tensor
    verified: Tensor
    image_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device, for a GPU without waiting where the batch is in page-locked memory."""
        to_gpu = torch.device(device).type != "cpu"  # a copy to the host has its values when this returns
        return self._map(lambda tensor: tensor.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory (torch's DataLoader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        names = [item.name for item in fields(self) if item.name != "image_ids"]
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **changed)


def padded(parts: Sequence[Instances]) -> dict[str, Tensor]:
    """Stack the instances of several images, padded to a number of rows that few other batches differ from.

    Returns:
        The columns of a `Batch`, boxes to frames, [B, G, ...] with G from `padded_count`.
    """
    count = padded_count(max(len(part) for part in parts))
    columns: dict[str, Tensor] = {}
    for item in fields(Instances):
        values = [getattr(part, item.name) for part in parts]
        columns[item.name] = values[0].new_zeros((len(parts), count, *values[0].shape[1:]))
        for row, value in zip(columns[item.name], values):
            row[: len(value)] = value
    # A box or frame that is not used must not divide by its size of zero.
    columns["boxes"][columns["labels"] == 0] = torch.tensor(PIXEL)
    columns["frames"][columns["flags"] & HAS_MASK == 0] = torch.tensor(PIXEL)
    return columns


def padded_count(count: int) -> int:
    """Return the number of rows that `count` instances are padded to: 8, 16, 32 and so on."""
    return max(MIN_ROWS, 1 << max(count - 1, 0).bit_length())


def read_instances(annotations: Sequence[Instance]) -> Instances:
    """Convert the annotations of one sample, in pixels of the stored image."""
    count = len(annotations)
    boxes = np.array([a.bbox for a in annotations], dtype=np.float32).reshape(count, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([a.category_id for a in annotations], dtype=np.int64)
    flags = np.array([GROUP_OF if a.is_group_of else 0 for a in annotations], dtype=np.uint8)
    bitmaps = torch.zeros((count, BITMAP, BITMAP), dtype=torch.uint8)
    frames = np.zeros((count, 4), dtype=np.float32)
    for i, annotation in enumerate(annotations):
        # A mask without a pixel says nothing about the object: the object counts as one without a mask.
        if annotation.segmentation is not None and (mask := rasterise(annotation.segmentation)) is not None:
            bitmaps[i], frames[i] = mask
            flags[i] |= HAS_MASK if annotation.prediction is None else HAS_MASK | PREDICTED
    # A box from inside an object is the image's; a drawing has colours of its own.
    loose = torch.tensor([a.is_depiction or a.is_inside for a in annotations], dtype=torch.bool)
    found = Instances(
        torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(flags), bitmaps, torch.from_numpy(frames)
    )
    return found.loosened(loose)


def is_large(boxes: Tensor) -> Tensor:
    """Whether both sides of each box, float32 [M, 4], have at least MIN_SIDE pixels: bool [M]."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(dim=1)


def _mirror(boxes: Tensor, width: float) -> Tensor:
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack((width - x1, y0, width - x0, y1), dim=1)
