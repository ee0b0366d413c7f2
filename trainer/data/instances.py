"""The objects of an image, and of a batch, as flat tensors. A mask is a bitmap in a frame.

A full-size mask an object is what makes Mask R-CNN's data path heavy: 20 objects at 1024 x 1024 are 20 MB, resized and
flipped for every image. Here each mask is read once from its RLE into BITMAP x BITMAP cells over its own extent, the
frame. From then on geometry moves frames, and a RoI's target is sampled from the cells.

Coordinates are continuous: pixel i covers i to i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from shards.format.rle import Rle, runs
from shards.format.sample import Instance

# Bits of `flags`.
HAS_MASK = 1
GROUP_OF = 2
IGNORED = 4  # neither an object to learn from nor background

# Cells a side. A mask head's target has 28, so that a RoI around the object has three cells a bin: twice as close to
# full-size masks as 56, at 7 KB an object; 112 gains little more.
BITMAP = 84
SAMPLES = 3  # points a bin and side at which a target reads the cells
MIN_SIDE = 1.0  # a box that resizing or cropping left narrower than this, in pixels, is dropped


@dataclass(frozen=True)
class Instances:
    """The annotated objects of one image.

    Attributes:
        boxes: float32 [M, 4] x0, y0, x1, y1 in pixels.
        labels: int64 [M] category ids, 1..C.
        flags: uint8 [M] HAS_MASK, GROUP_OF and IGNORED.
        bitmaps: uint8 [M, BITMAP, BITMAP] 0..255, how much of a cell the object covers; zeros where there is no mask.
        frames: float32 [M, 4] x0, y0, x1, y1 of the bitmap in pixels of the image; zeros where there is no mask.
    """

    boxes: Tensor
    labels: Tensor
    flags: Tensor
    bitmaps: Tensor
    frames: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Instances:
        """Those at `index`, bool [M] or int64 [K]."""
        return Instances(**{item.name: getattr(self, item.name)[index] for item in fields(self)})


@dataclass(frozen=True)
class Batch:
    """What one training step takes; it crosses the worker boundary as nine flat tensors.

    Attributes:
        images: uint8 [B, 3, H, W] RGB, padded right and bottom with zeros.
        sizes: int64 [B, 2] (height, width) of each image inside the padding. Stays on the host.
        boxes, labels, flags, bitmaps, frames: as in `Instances`, image after image, in pixels of the resized image.
            `flags` stays on the host.
        counts: int64 [B] instances of each image. Stays on the host.
        image_ids: the B keys.
        verified: for each image the ids of the classes of which its annotations are complete; None for all classes.
    """

    images: Tensor
    sizes: Tensor
    boxes: Tensor
    labels: Tensor
    flags: Tensor
    bitmaps: Tensor
    frames: Tensor
    counts: Tensor
    image_ids: tuple[str, ...]
    verified: tuple[tuple[int, ...] | None, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str) -> Batch:
        """A copy on a device. `sizes`, `counts` and `flags` decide what is computed, for which a GPU would have to be
        waited for: they stay where they are."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), but=("sizes", "counts", "flags"))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory (torch's DataLoader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Any, but: Sequence[str] = ()) -> Batch:
        names = [item.name for item in fields(self) if item.name not in ("image_ids", "verified", *but)]
        return replace(self, **{name: function(getattr(self, name)) for name in names})


def read_instances(annotations: Sequence[Instance]) -> Instances:
    """The annotations of one sample, in pixels of the image as stored."""
    count = len(annotations)
    boxes = np.array([a.bbox for a in annotations], dtype=np.float32).reshape(count, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([a.category_id for a in annotations], dtype=np.int64)
    flags = np.array([GROUP_OF * a.is_group_of for a in annotations], dtype=np.uint8)
    bitmaps = torch.zeros((count, BITMAP, BITMAP), dtype=torch.uint8)
    frames = np.zeros((count, 4), dtype=np.float32)
    for i, annotation in enumerate(annotations):
        # A mask without a single pixel says nothing about the object.
        if annotation.segmentation is not None and (mask := rasterise(annotation.segmentation)) is not None:
            bitmaps[i], frames[i] = mask
            flags[i] |= HAS_MASK
    return Instances(
        torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(flags), bitmaps, torch.from_numpy(frames)
    )


def rasterise(mask: Rle, side: int = BITMAP) -> tuple[Tensor, tuple[float, float, float, float]] | None:
    """A mask as a bitmap in a frame; None for a mask without a pixel.

    The mask is read as `roi_align` reads an image, linearly between the centres of pixels, and averaged exactly over
    each cell: right for objects larger and smaller than `side` pixels alike. The frame is the mask's own extent (a
    mask may stand out of its annotated box) and one more cell on every side, which is empty.

    No pixel is written out: a run is a step up and a step down, and what it adds to the cells of its column is the
    difference of two rows of a table.

    Args:
        mask: the mask.
        side: cells a side.

    Returns:
        uint8 [side, side], and the frame x0, y0, x1, y1 in pixels.
    """
    column, top, bottom = _column_runs(mask)
    if len(column) == 0:
        return None
    x, y = int(column[0]), int(top.min())
    width, height = int(column[-1]) + 1 - x, int(bottom.max()) - y
    rows, margin_y = _lit_by_steps(height, side, starts=y == 0, ends=y + height == mask.height)
    columns, margin_x = _lit_by_steps(width, side, starts=x == 0, ends=x + width == mask.width)
    across = (columns[:-1] - columns[1:])[column - x]
    down = rows[top - y] - rows[bottom - y]
    bitmap = (torch.from_numpy(down).T @ torch.from_numpy(across)).mul_(255).round_().to(torch.uint8)
    return bitmap, (x - margin_x, y - margin_y, x + width + margin_x, y + height + margin_y)


def _lit_by_steps(length: int, side: int, *, starts: bool, ends: bool) -> tuple[NDArray[np.float32], float]:
    """How much of each cell of a frame over the pixels 0..length - 1 is lit by a step from 0 to 1 at a pixel's border.

    The pixels a..b - 1 light row a less row b.

    Args:
        length: pixels.
        side: cells.
        starts, ends: the image starts with pixel 0, or ends with the last: that pixel is repeated beyond, as
            `roi_align` does.

    Returns:
        float32 [length + 1, side], and the distance from the frame's border to pixel 0, in pixels.
    """
    # Read linearly, a pixel shines half a pixel over its border; then follows the empty cell.
    cell = (length + 1) / (side - 2)
    margin = 0.5 + cell
    borders = np.arange(side + 1, dtype=np.float32) * np.float32(cell) - np.float32(margin)
    steps = np.arange(length + 1, dtype=np.float32)
    steps[0] -= starts
    steps[-1] += ends
    # A step at `s`, read linearly, is a ramp from s - 1/2 to s + 1/2; its integral up to each border:
    past = borders[None, :] - (steps - np.float32(0.5))[:, None]
    ramp = np.minimum(np.maximum(past, np.float32(0)), np.float32(1))
    past -= ramp * np.float32(0.5)
    integral = np.multiply(ramp, past, out=ramp)
    return (integral[:, 1:] - integral[:, :-1]) * np.float32(1 / cell), margin


def _column_runs(mask: Rle) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The object's runs, cut at the ends of columns: int64 [R] the column (ascending), the first row, and the row after
    the last. Runs go down the columns, and on into the next."""
    borders = np.cumsum(runs(mask))
    stops = borders[1::2]
    starts = borders[: 2 * len(stops) : 2]
    some = stops > starts
    starts, stops = starts[some], stops[some]
    column, top = np.divmod(starts, mask.height)
    last, bottom = np.divmod(stops - 1, mask.height)
    bottom += 1
    crossed = last - column
    if not crossed.any():
        return column, top, bottom
    columns = crossed + 1
    run = np.repeat(np.arange(len(column)), columns)
    later = np.arange(len(run)) - (np.cumsum(columns) - columns)[run]  # columns after the run's first
    return (
        column[run] + later,
        np.where(later == 0, top[run], 0),
        np.where(later == crossed[run], bottom[run], mask.height),
    )


def flip(instances: Instances, width: float) -> Instances:
    """Mirror left and right in an image of `width` pixels."""
    return replace(
        instances,
        boxes=_mirror(instances.boxes, width),
        frames=_mirror(instances.frames, width),
        bitmaps=instances.bitmaps.flip(-1),
    )


def _mirror(boxes: Tensor, width: float) -> Tensor:
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack((width - x1, y0, width - x0, y1), dim=1)


def scale(instances: Instances, x: float, y: float) -> Instances:
    """Resize the image by factors."""
    factors = torch.tensor([x, y, x, y])
    return replace(instances, boxes=instances.boxes * factors, frames=instances.frames * factors)


def crop(instances: Instances, x: float, y: float, width: float, height: float) -> Instances:
    """Cut a window out of the image: frames move, boxes move and are clipped, and boxes that keep less than MIN_SIDE
    pixels of a side are dropped. The cells outside the window stay: a RoI, which lies inside, never sees them."""
    shift = torch.tensor([x, y, x, y])
    limit = torch.tensor([width, height, width, height])
    boxes = (instances.boxes - shift).clamp(min=0).minimum(limit)
    moved = replace(instances, boxes=boxes, frames=instances.frames - shift)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(dim=1)
    return moved if kept.all() else moved.select(kept)


def cap(instances: Instances, most: int, rng: np.random.Generator) -> Instances:
    """Leave at most `most` objects of an image to learn from: a random choice of the others is IGNORED.

    A choice at random, and another each epoch, because the largest would leave small objects out for ever. Group-of
    regions do not count.
    """
    objects = np.flatnonzero((instances.flags & (GROUP_OF | IGNORED)).numpy() == 0)
    if len(objects) <= most:
        return instances
    flags = instances.flags.clone()
    flags[torch.from_numpy(rng.permutation(objects)[most:])] |= IGNORED
    return replace(instances, flags=flags)


def sample_targets(bitmaps: Tensor, frames: Tensor, objects: Tensor, rois: Tensor, size: int) -> Tensor:
    """What the mask head should answer for each RoI: torchvision's `project_masks_on_boxes`, from bitmaps.

    Args:
        bitmaps: uint8 [K, m, m].
        frames: float32 [K, 4].
        objects: int64 [R], the object of each RoI; it has a mask.
        rois: float32 [R, 4] x0, y0, x1, y1 in pixels.
        size: side of a target.

    Returns:
        float32 [R, size, size], 0 to 1.
    """
    corner, opposite = frames[objects].split(2, dim=1)
    cells = bitmaps.shape[-1] / (opposite - corner)
    # torchvision reads its masks with `aligned=False`: the centre of pixel 0 lies at 0, so all that it sees lies half a
    # pixel further. Bitmaps are read in true coordinates, at the place that torchvision sees.
    places = (rois.to(frames) + 0.5 - corner.repeat(1, 2)) * cells.repeat(1, 2)
    indexed = torch.cat((objects[:, None].to(places), places), dim=1)
    values = bitmaps[:, None].to(places) / 255
    targets: Tensor = roi_align(values, indexed, (size, size), sampling_ratio=SAMPLES, aligned=True)[:, 0]
    return targets
