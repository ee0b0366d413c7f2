from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from builder.sources.openimages.box_matching import JOIN_TOLERANCE, match_boxes

# A group and two coordinates, in steps of a third of the tolerance.
rows_near_each_other = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(0, 12)), max_size=12)


def as_arrays(rows: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    groups = np.array([group for group, _, _ in rows], dtype=np.int64)
    boxes = np.array([[a, a + 50, b, b + 50] for _, a, b in rows], dtype=np.float64).reshape(-1, 4)
    return groups, boxes * (JOIN_TOLERANCE / 3)


@given(rows_near_each_other, rows_near_each_other)
def test_match_boxes_equals_a_greedy_loop_over_all_pairs(
    masks: list[tuple[int, int, int]], boxes: list[tuple[int, int, int]]
) -> None:
    mask_groups, mask_boxes = as_arrays(masks)
    box_groups, box_boxes = as_arrays(boxes)
    pairs = [
        (np.abs(mask_boxes[m] - box_boxes[b]).max(), m, b)
        for m in range(len(masks))
        for b in range(len(boxes))
        if mask_groups[m] == box_groups[b]
    ]
    expected, taken = [-1] * len(masks), set()
    for distance, m, b in sorted(pairs):
        if distance <= JOIN_TOLERANCE and expected[m] < 0 and b not in taken:
            expected[m] = b
            taken.add(b)
    assert match_boxes(mask_groups, mask_boxes, box_groups, box_boxes).tolist() == expected


def test_match_boxes_never_matches_nan() -> None:
    one = np.zeros(1, dtype=np.int64)
    assert match_boxes(one, np.full((1, 4), np.nan), one, np.zeros((1, 4))).tolist() == [-1]
