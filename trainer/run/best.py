"""Which evaluation of a run is its best. Imports nothing, so that `compare --help` is quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def best_evaluation(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the row of evaluations.jsonl with the highest AP; the first of equal ones, as in most early stopping.

    Args:
        rows: at least one.
    """
    return max(rows, key=deciding_ap)


def deciding_ap(row: Mapping[str, Any]) -> float:
    """Return the mask AP of an evaluation, its box AP if the split has no masks, or -1 if it has no objects."""
    ap = row["bbox"]["ap"] if row["segm"]["ap"] is None else row["segm"]["ap"]
    return -1.0 if ap is None else float(ap)
