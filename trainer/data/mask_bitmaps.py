"""Masks as small bitmaps in frames: from RLE to a bitmap, and from bitmaps to targets of the mask head.

Full-size masks make the data path of Mask R-CNN heavy: 20 objects at 1024 x 1024 are 20 MB, resized and flipped for
every image. Here each mask is read once from its RLE into BITMAP x BITMAP cells over its own extent, the frame.
Augmentations move the frame, and the target of a RoI is sampled from the cells.

Coordinates are continuous: pixel i covers i to i + 1.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from shards.format.rle import Rle, runs

# Cells per side. Targets have 28 per side, so a RoI around the object has three cells per target pixel: half the error
# of 56 cells (compared with full-size masks), at 7 KB per object. 112 cells gain little more.
BITMAP = 84
SAMPLES = 3  # sampling points per side of a target pixel
FAINT = 32  # of 255: cells with less coverage do not count as a part of an object that is thinner than a cell


def rasterise(mask: Rle, side: int = BITMAP) -> tuple[Tensor, tuple[float, float, float, float]] | None:
    r"""Convert a mask to a bitmap of the share of each cell that it covers.

    The coverage of a cell is an integral: the mask is interpolated linearly between pixel centres, as `roi_align` reads
    an image, and averaged exactly over the cell. This holds for objects larger and smaller than `side` pixels.

    The mask is a sum of runs down its columns. Interpolation is separable, so a run covers each cell by the product of
    a vertical and a horizontal integral. In one dimension the pixels a to b - 1, interpolated, are a step at `a` minus
    a step at `b`; a step becomes a ramp of one pixel, and its integral over each cell is looked up in a table:

        1              _______________
                      /               \
        0 ___________/                 \_____________
                     a                 b
          |      |      |      |      |      |      |    cell borders

    Returns:
        uint8 [side, side], 0 to 255, and its frame x0, y0, x1, y1 in pixels: the mask's own extent (which may exceed
        the annotated box) with one empty cell on every side. None for a mask without a pixel.
    """
    column, top, bottom = _column_runs(mask)
    if len(column) == 0:
        return None
    x, y = int(column[0]), int(top.min())
    width, height = int(column[-1]) + 1 - x, int(bottom.max()) - y
    over_rows, margin_y = _step_integrals(height, side, at_start=y == 0, at_end=y + height == mask.height)
    over_columns, margin_x = _step_integrals(width, side, at_start=x == 0, at_end=x + width == mask.width)
    vertical = over_rows[top - y] - over_rows[bottom - y]  # [R, side]
    horizontal = (over_columns[:-1] - over_columns[1:])[column - x]  # [R, side]
    coverage = torch.from_numpy(vertical).T @ torch.from_numpy(horizontal)  # [side, side]
    frame = (x - margin_x, y - margin_y, x + width + margin_x, y + height + margin_y)
    return coverage.mul_(255).round_().to(torch.uint8), frame


def _step_integrals(length: int, side: int, *, at_start: bool, at_end: bool) -> tuple[NDArray[np.float32], float]:
    """Integrate a step from 0 to 1, interpolated to a ramp, over each cell, for a step at every pixel border.

    The mask extends over `length` pixels. `at_start` and `at_end` say whether its first and last pixel are at the
    border of the image: `roi_align` repeats such a pixel beyond the border, so its step moves outwards by a pixel.

    Returns:
        float32 [length + 1, side] means over the cells, and the distance from the frame's border to pixel 0, in pixels.
    """
    # Interpolated, the mask extends half a pixel over its border on either side; then follows the empty cell.
    cell = (length + 1) / (side - 2)
    margin = 0.5 + cell
    borders = np.arange(side + 1, dtype=np.float32) * np.float32(cell) - np.float32(margin)
    steps = np.arange(length + 1, dtype=np.float32)
    steps[0] -= at_start
    steps[-1] += at_end
    # A step at s is a ramp from s - 1/2 to s + 1/2. With t = border - (s - 1/2), its integral up to the border is
    # t^2 / 2 on the ramp and t - 1/2 beyond it: r (t - r / 2) for r = clip(t, 0, 1).
    past = borders[None, :] - (steps - np.float32(0.5))[:, None]  # [length + 1, side + 1]
    ramp = np.minimum(np.maximum(past, np.float32(0)), np.float32(1))
    past -= ramp * np.float32(0.5)
    integral = np.multiply(ramp, past, out=ramp)
    return (integral[:, 1:] - integral[:, :-1]) * np.float32(1 / cell), margin


def _column_runs(mask: Rle) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut the mask's runs at the ends of columns, because RLE continues a run into the next column.

    The result is int64 [R] each: the column (ascending), the first row, and the row after the last.
    """
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


def sample_targets(bitmaps: Tensor, frames: Tensor, objects: Tensor, rois: Tensor, size: int) -> Tensor:
    """Sample the mask target of each RoI from bitmaps, as torchvision's `project_masks_on_boxes` does from masks.

    Args:
        bitmaps: uint8 [K, m, m].
        frames: float32 [K, 4] of each bitmap.
        objects: int64 [R] the object of each RoI; it must have a mask.
        rois: float32 [R, 4] x0, y0, x1, y1 in pixels.
        size: pixels per side of a target.

    Returns:
        float32 [R, size, size], 0 to 1.
    """
    corner, opposite = frames[objects].split(2, dim=1)
    cells = bitmaps.shape[-1] / (opposite - corner)
    # torchvision reads its masks with `aligned=False`, where the centre of pixel 0 is at 0 and everything appears half
    # a pixel further. The bitmaps have true coordinates and are read at the place that torchvision reads.
    places = (rois.to(frames) + 0.5 - corner.repeat(1, 2)) * cells.repeat(1, 2)
    indexed = torch.cat((objects[:, None].to(places), places), dim=1)
    values = bitmaps[:, None].to(places) / 255
    targets: Tensor = roi_align(values, indexed, (size, size), sampling_ratio=SAMPLES, aligned=True)[:, 0]
    return targets


def extents(bitmaps: Tensor, frames: Tensor) -> Tensor:
    """Return the boxes, float32 [M, 4], around the objects in bitmaps, uint8 [M, m, m]; no area if one is empty."""
    side = bitmaps.shape[-1]
    rows, columns = bitmaps.amax(dim=2), bitmaps.amax(dim=1)  # [M, m]
    first = torch.stack((_first_covered(columns), _first_covered(rows)), dim=1)  # [M, 2] in cells
    last = side - torch.stack((_first_covered(columns.flip(1)), _first_covered(rows.flip(1))), dim=1)
    corner, opposite = frames.split(2, dim=1)
    cell = (opposite - corner) / side
    return torch.cat((corner + first * cell, corner + last.maximum(first) * cell), dim=1)


def is_inside(bitmaps: Tensor, frames: Tensor, height: float, width: float, margin: float = 0.0) -> Tensor:
    """Whether the centre of each cell is less than `margin` pixels outside of an image: bool [M, m, m]."""
    centres = (torch.arange(bitmaps.shape[-1]) + 0.5) / bitmaps.shape[-1]
    x, y = (frames[:, i, None] + (frames[:, i + 2] - frames[:, i])[:, None] * centres for i in (0, 1))  # [M, m]
    is_row, is_column = (y > -margin) & (y < height + margin), (x > -margin) & (x < width + margin)
    return is_row[:, :, None] & is_column[:, None]


def _first_covered(line: Tensor) -> Tensor:
    """Return where each line of cells, uint8 [M, m], is first covered, in cells: float32 [M]; m if nowhere.

    That is where the coverage, interpolated between the centres of cells, reaches half of that of the next cell: so it
    finds the edge of a large object within a cell, and the tip of a part that is thinner than a cell.
    """
    cells = F.pad(line.float(), (1, 1))
    before, here, after = cells[:, :-2], cells[:, 1:-1], cells[:, 2:]  # [M, m]
    half = here.maximum(after) / 2
    is_covered = (here >= half) & (here >= FAINT)
    edge = torch.arange(line.shape[1]) + 0.5 - ((here - half) / (here - before).clamp(min=1)).clamp(max=1)
    return torch.where(is_covered, edge, line.shape[1]).amin(dim=1)
