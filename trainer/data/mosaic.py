"""Mosaic: four images in one (Bochkovskiy et al., "YOLOv4: Optimal Speed and Accuracy of Object Detection", 2020)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.affine import OUTSIDE
from trainer.data.augment import resize
from trainer.data.copy_paste import occlude
from trainer.data.instances import HAS_MASK, Instances

TILES = 4
MEETING = (0.25, 0.75)  # where the four images meet, as a share of each side


def mosaic(
    parts: Sequence[tuple[Tensor, Instances]], height: int, width: int, rng: np.random.Generator
) -> tuple[Tensor, Instances, Tensor]:
    """Join four images, uint8 [3, h, w], in one of `height` x `width`; they meet at a random point.

    Each is scaled down until it just covers its tile, and cut to it at a random place; what an object loses there
    counts as hidden, see `occlude`. A smaller image is not enlarged: OUTSIDE is around it.

    Returns:
        The image, its instances, and the tiles: float32 [4, 4] x0, y0, x1, y1, which together cover the image.
    """
    share_x, share_y = rng.uniform(*MEETING, 2)
    x, y = int(width * share_x), int(height * share_y)
    tiles = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    joined = torch.tensor(OUTSIDE, dtype=torch.uint8).repeat(height, width, 1).permute(2, 0, 1)
    moved = []
    for (image, instances), (x0, y0, x1, y1) in zip(parts, tiles, strict=True):
        factor = min(max((y1 - y0) / image.shape[-2], (x1 - x0) / image.shape[-1]), 1)
        small, objects = resize(image, instances, *(math.ceil(side * factor) for side in image.shape[-2:]))
        high, wide = min(small.shape[-2], y1 - y0), min(small.shape[-1], x1 - x0)
        top, left = (int(rng.integers(0, slack + 1)) for slack in (small.shape[-2] - high, small.shape[-1] - wide))
        to_x, to_y = (x - wide if x0 < x else x), (y - high if y0 < y else y)
        window = (slice(top, top + high), slice(left, left + wide))
        joined[:, to_y : to_y + high, to_x : to_x + wide] = small[:, window[0], window[1]]
        moved.append(_cut(objects.without_outside(*small.shape[-2:]), left, top, wide, high).shift(to_x, to_y))
    return joined, Instances.concatenate(moved), torch.tensor(tiles, dtype=torch.float32)


def _cut(objects: Instances, left: int, top: int, width: int, height: int) -> Instances:
    """Cut the objects of an image to a window."""
    objects, size = objects.shift(-left, -top), torch.tensor([width, height])
    extents = torch.where((objects.flags & HAS_MASK)[:, None] != 0, objects.frames, objects.boxes)
    inside = ((extents[:, :2] >= 0) & (extents[:, 2:] <= size)).all(dim=1)
    touching = ((objects.boxes[:, :2] < size) & (objects.boxes[:, 2:] > 0)).all(dim=1)
    cut = objects.select(touching & ~inside)
    # The cover reaches as far as the objects, because `occlude` takes what is beyond it for visible.
    reach = torch.cat((cut.boxes, cut.frames)).reshape(-1, 2)  # [4 K, 2]
    before, after = ((-reach).clamp(min=0), (reach - size).clamp(min=0))
    x0, y0, x1, y1 = (int(side.max()) + 2 if len(cut) else 0 for side in (*before.unbind(1), *after.unbind(1)))
    cover = F.pad(torch.zeros(height, width), (x0, x1, y0, y1), value=1.0)
    visible = occlude(cut.shift(x0, y0), cover).shift(-x0, -y0)
    return Instances.concatenate([objects.select(inside), visible]).crop(0, 0, width, height)
