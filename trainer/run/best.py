"""Which evaluation of a run is its best. Imports no torch, so that `compare --help` is quick."""

from collections.abc import Mapping, Sequence
from typing import Any


def since_best(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of evaluations after the best one; 0 without any."""
    return len(rows) - 1 - list(rows).index(best_evaluation(rows)) if rows else 0


def best_evaluation(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the first row of evaluations.jsonl with the highest mask AP, or box AP if the split has no masks."""

    def deciding_ap(row: Mapping[str, Any]) -> float:
        ap = row["bbox"]["ap"] if row["segm"]["ap"] is None else row["segm"]["ap"]
        return -1.0 if ap is None else float(ap)  # None: the split has no objects

    return max(rows, key=deciding_ap)
