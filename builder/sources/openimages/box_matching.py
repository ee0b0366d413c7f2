"""Greedy one-to-one matching of mask rows to box rows by their coordinates."""

import numpy as np
from numpy.typing import NDArray

# The two tables write the same box with different digits (0.185 and 0.185000), which 1e-5 would allow for. Boxes that
# were redrawn between releases differ a little more. 0.01 is 10 pixels of 1024: two objects of one class are hardly
# ever that close on all four sides, and the nearest is taken first.
JOIN_TOLERANCE = 0.01
JOIN_BLOCK = 1 << 16  # mask rows compared at a time, which limits the memory for pairs


def match_boxes(
    mask_groups: NDArray[np.int64],
    mask_boxes: NDArray[np.float64],
    box_groups: NDArray[np.int64],
    box_boxes: NDArray[np.float64],
    tolerance: float = JOIN_TOLERANCE,
) -> NDArray[np.int64]:
    """Match each mask to the nearest box of its group, one to one, the nearest pairs first.

    Args:
        mask_groups: int64 [M], a number per (image, label): rows of one number can match.
        mask_boxes: float64 [M, 4] coordinates.
        box_groups, box_boxes: int64 [B] and float64 [B, 4], likewise.
        tolerance: The largest difference in any coordinate.

    Returns:
        int64 [M]: the row of each mask's box, or -1 if no remaining box is within the tolerance.
    """
    order = np.argsort(box_groups, kind="stable")
    sorted_groups = box_groups[order]
    first = np.searchsorted(sorted_groups, mask_groups, "left")  # [M]
    count = np.searchsorted(sorted_groups, mask_groups, "right") - first
    near: list[tuple[NDArray, NDArray, NDArray]] = []
    for start in range(0, len(mask_groups), JOIN_BLOCK):
        block = slice(start, start + JOIN_BLOCK)
        mask = np.repeat(np.arange(start, start + len(count[block])), count[block])  # [pairs]
        ends = np.cumsum(count[block])
        within = np.arange(len(mask)) - np.repeat(ends - count[block], count[block])
        box = order[first[mask] + within]
        distance = np.abs(mask_boxes[mask] - box_boxes[box]).max(axis=1, initial=0.0)
        close = distance <= tolerance  # false for NaN
        near.append((distance[close], mask[close], box[close]))
    result = np.full(len(mask_groups), -1, dtype=np.int64)
    if not near:
        return result
    distance, mask, box = (np.concatenate(parts) for parts in zip(*near))
    taken: set[int] = set()
    for pair in np.lexsort((box, mask, distance)):
        if result[mask[pair]] < 0 and int(box[pair]) not in taken:
            result[mask[pair]] = box[pair]
            taken.add(int(box[pair]))
    return result
