"""Outlines of masks as polygons and as SVG paths.

A contour follows the edges of pixels, so it is exact. Simplified (Douglas and Peucker, "Algorithms for the reduction of
the number of points required to represent a digitized line", 1973) it stays within a tolerance.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.int64]

# Steps by direction: right, down, left, up; y points down. The object is on the right of each step.
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def contours(mask: NDArray[np.bool_]) -> list[Points]:
    """Trace the closed contours of a mask [H, W], including those of holes: the even-odd rule fills exactly the mask.

    A contour is the corners of pixels [n, 2] x, y, without points on straight lines; the last is joined to the first.
    """
    inside = np.pad(mask, 1)
    core = inside[1:-1, 1:-1]
    # Pixels of the object without a neighbour above, right, below, left; and the corner where that edge begins.
    edges = (
        (core & ~inside[:-2, 1:-1], (0, 0)),
        (core & ~inside[1:-1, 2:], (1, 0)),
        (core & ~inside[2:, 1:-1], (1, 1)),
        (core & ~inside[1:-1, :-2], (0, 1)),
    )
    leaving: dict[tuple[int, int], list[int]] = {}
    for direction, (at, (right, down)) in enumerate(edges):
        ys, xs = np.nonzero(at)
        for corner in zip((xs + right).tolist(), (ys + down).tolist()):
            leaving.setdefault(corner, []).append(direction)
    found = []
    while leaving:
        found.append(_follow(leaving))
    return found


def _follow(leaving: dict[tuple[int, int], list[int]]) -> Points:
    """Trace one contour and remove its edges from `leaving`, the directions of edges by their corner."""
    start, (direction, *_) = next(iter(leaving.items()))
    corner, last, points = start, -1, []
    while True:
        ways = leaving[corner]
        # If two pixels touch only at a corner, the right turn separates them.
        direction = direction if last < 0 else next(d for d in ((last + 1) % 4, last, (last - 1) % 4) if d in ways)
        ways.remove(direction)
        if not ways:
            del leaving[corner]
        if direction != last:
            points.append(corner)
        corner, last = (corner[0] + STEPS[direction][0], corner[1] + STEPS[direction][1]), direction
        if corner == start and (corner not in leaving or (last + 1) % 4 not in leaving[corner]):
            break
    ring = np.array(points, dtype=np.int64)
    turns_at_start = not np.array_equal(np.sign(ring[1] - ring[0]), np.sign(ring[0] - ring[-1]))
    return ring if turns_at_start else ring[1:]


def simplify(ring: Points, tolerance: float) -> Points:
    """Remove points of a closed contour [n, 2] that are within `tolerance` pixels of the line without them."""
    if len(ring) < 4:
        return ring
    closed = np.vstack((ring, ring[:1]))
    far = int(np.argmax(((ring - ring[0]) ** 2).sum(axis=1)))
    keep = {0, far}
    parts = [(0, far), (far, len(ring))]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        between, start = closed[first + 1 : last] - closed[first], closed[last] - closed[first]
        length = float(np.hypot(*start))
        away = np.hypot(*between.T) if length == 0 else np.abs(between @ (start[1], -start[0])) / length
        worst = int(np.argmax(away))
        if away[worst] > tolerance:
            middle = first + 1 + worst
            keep.add(middle)
            parts += [(first, middle), (middle, last)]
    return ring[sorted(keep)] if len(keep) > 2 else simplify(ring, tolerance / 2)  # two points enclose no area


def joined(rings: Sequence[Points]) -> Points:
    """Join closed contours, at least one, into a single one that the even-odd rule fills alike.

    Each is joined to the longest and those joined before by a bridge between the two nearest points, a line there and
    back, which encloses no area.
    """
    whole, *others = sorted(rings, key=len, reverse=True)
    for ring in others:
        distances = ((whole[:, None] - ring[None]) ** 2).sum(axis=2)  # [points of whole, points of ring]
        at, start = divmod(int(distances.argmin()), len(ring))
        around = np.roll(ring, -start, axis=0)
        whole = np.concatenate((whole[: at + 1], around, around[:1], whole[at:]))
    return whole


def svg_path(rings: Iterable[Points]) -> str:
    """Return the `d` attribute of an SVG path, in relative steps; contours of fewer than three points are left out."""
    parts = []
    for ring in rings:
        if len(ring) < 3:
            continue
        steps = " ".join(map(str, np.diff(ring, axis=0).ravel().tolist())).replace(" -", "-")
        parts.append(f"M{ring[0, 0]} {ring[0, 1]}l{steps}z")
    return "".join(parts)
