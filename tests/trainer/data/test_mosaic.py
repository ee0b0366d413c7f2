"""Mosaic, against full-size masks."""

import math

import numpy as np
import torch
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as transforms

from shards.format import rle
from shards.format.sample import Instance
from trainer.data.affine import OUTSIDE
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, read_instances
from trainer.data.mask_bitmaps import sample_targets
from trainer.data.mosaic import mosaic

SIZES = [(200, 300), (160, 160), (300, 200), (60, 70)]  # of the four images; the last is smaller than its tile
HEIGHT, WIDTH = 200, 300


def ellipses(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    places = [(0.3, 0.4, 0.2, 0.25), (0.75, 0.6, 0.2, 0.3), (0.5, 0.85, 0.08, 0.1)]
    return np.stack(
        [((x / width - cx) / rx) ** 2 + ((y / height - cy) / ry) ** 2 <= 1 for cx, cy, rx, ry in places]
    ).astype(np.uint8)


def test_mosaic_agrees_with_full_size_masks() -> None:
    parts, scenes = [], [torch.from_numpy(ellipses(*size)) for size in SIZES]
    for i, masks in enumerate(scenes):
        encoded = [rle.encode(mask) for mask in masks.numpy()]
        annotations = [Instance(3 * i + j + 1, rle.bounds(mask), mask) for j, mask in enumerate(encoded)]
        image = torch.full((3, *SIZES[i]), 50 * i, dtype=torch.uint8)
        parts.append((image, read_instances(annotations)))
    for seed in range(5):
        image, found, tiles = mosaic(parts, HEIGHT, WIDTH, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        shares = rng.uniform(0.25, 0.75, 2)
        x, y = int(WIDTH * shares[0]), int(HEIGHT * shares[1])
        visible = torch.zeros((12, HEIGHT, WIDTH), dtype=torch.bool)
        pixels = torch.tensor(OUTSIDE, dtype=torch.uint8)[:, None, None].repeat(1, HEIGHT, WIDTH)
        whole = []
        for i, masks in enumerate(scenes):
            down, right = (slice(0, y), slice(y, HEIGHT))[i // 2], (slice(0, x), slice(x, WIDTH))[i % 2]
            assert tiles[i].tolist() == [right.start, down.start, right.stop, down.stop]
            (height, width), (h, w) = SIZES[i], (down.stop - down.start, right.stop - right.start)
            factor = min(1.0, max(h / height, w / width))
            size = [math.ceil(height * factor), math.ceil(width * factor)]
            scaled = transforms.resize(masks * 255, size, antialias=False) > 127
            top, left = int(rng.integers(0, max(size[0] - h, 0) + 1)), int(rng.integers(0, max(size[1] - w, 0) + 1))
            part = scaled[:, top : top + h, left : left + w]
            h, w = part.shape[1:]
            down, right = (slice(y - h, y), slice(y, y + h))[i // 2], (slice(x - w, x), slice(x, x + w))[i % 2]
            visible[3 * i : 3 * i + 3, down, right], pixels[:, down, right] = part, 50 * i
            whole.append(scaled.sum((1, 2)))
        assert torch.equal(image, pixels)
        share = visible.sum((1, 2)) / torch.cat(whole)
        clear = (share > 0.13).nonzero()[:, 0]
        rows = [found.labels.tolist().index(i + 1) for i in clear.tolist()]
        assert (found.flags[rows] == HAS_MASK).all()
        assert (found.flags[share[found.labels - 1] < 0.07] == HAS_MASK | IGNORED).all()
        masks = visible[clear]
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        assert (found.boxes[rows] - boxes).abs().max() <= 1.5
        bitmaps, frames, each = found.bitmaps[rows], found.frames[rows], torch.arange(len(rows))
        targets = project_masks_on_boxes(masks.float(), boxes, each, 28) > 0.5
        assert ((sample_targets(bitmaps, frames, each, boxes, 28) > 0.5) != targets).float().mean() < 0.02
        # A RoI that reaches into a neighbour finds no mask there.
        canvas = torch.tensor([[0.0, 0, WIDTH, HEIGHT]]).expand(len(rows), 4)
        of_canvas = sample_targets(bitmaps, frames, each, canvas, 100)
        xs, ys = torch.arange(100) * 3 + 1.5, torch.arange(100)[:, None] * 2 + 1
        for (x0, y0, x1, y1), values in zip(tiles[(found.labels[rows] - 1) // 3].tolist(), of_canvas, strict=True):
            assert values[(xs < x0 - 3) | (xs > x1 + 3) | (ys < y0 - 3) | (ys > y1 + 3)].max() < 0.1


def test_what_a_crop_left_of_an_object_is_in_no_other_tile() -> None:
    mask = np.zeros((200, 300), dtype=np.uint8)
    mask[40:160, 30:270] = 1
    object_ = Instance(1, (30.0, 40.0, 240.0, 120.0), rle.encode(mask))
    cropped = read_instances([object_]).crop(100, 0, 100, 200)  # the object reaches far over both sides
    parts = [(torch.zeros((3, 200, 100), dtype=torch.uint8), cropped)] * 4
    canvas, width = torch.tensor([[0.0, 0, 120, 200]]), 120  # tiles are narrower than what is cut to them
    for seed in range(5):
        _, found, tiles = mosaic(parts, 200, 120, np.random.default_rng(seed))
        values = sample_targets(found.bitmaps, found.frames, torch.arange(4), canvas.expand(4, 4), width)  # [4, w, w]
        centres = torch.arange(width) + 0.5
        for (x0, _, x1, _), columns in zip(tiles.tolist(), values.amax(1), strict=True):
            assert columns[(centres < x0 - 4) | (centres > x1 + 4)].max() < 0.1
            assert columns.max() > 0.9


def test_mosaic_keeps_regions_and_ignores_boxes_that_are_cut_in_half() -> None:
    annotations = [
        Instance(1, (0.0, 0.0, 60.0, 200.0), None),
        Instance(2, (0.0, 0.0, 300.0, 200.0), None, is_group_of=True),
    ]
    image = torch.zeros((3, 200, 300), dtype=torch.uint8)
    flags = set()
    for seed in range(20):
        _, cut, corners = mosaic([(image, read_instances(annotations))] * 4, 200, 300, np.random.default_rng(seed))
        regions = cut.boxes[cut.labels == 2]
        assert len(regions) == 4
        x, y = corners[0, 2:].tolist()
        assert regions[0].tolist() == [0, 0, x, y]
        first = cut.flags[cut.labels == 1]
        assert set(cut.flags[cut.labels == 2].tolist()) == {GROUP_OF}
        flags |= set((first & IGNORED).tolist())
    assert flags == {0, IGNORED}
