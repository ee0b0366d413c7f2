"""The run in one picture: losses, AP, images/s and learning rate over the steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

POINTS = 400  # of a curve at most: each is the mean of the steps about it


def draw_curves(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of four panels.

    Args:
        steps: rows of metrics.jsonl, at least one.
        evaluations: rows of evaluations.jsonl.
    """
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    losses, scores, speed, rate = figure.subplots(2, 2).ravel()
    x = np.array([row["step"] for row in steps], dtype=float)
    losses.plot(*thinned(x, _column(steps, "loss")), color="black", label="sum")
    for name in steps[0]["losses"]:
        values = np.array([_number(row["losses"][name]) for row in steps])
        losses.plot(*thinned(x, values), linewidth=1, label=name.removeprefix("loss_"))
    losses.set(title="losses", ylim=(0, None))
    losses.legend(fontsize="small")
    for kind, label in (("bbox", "box"), ("segm", "mask")):
        for key, style in (("ap", "o-"), ("ap50", "o:")):
            at = [row["step"] for row in evaluations]
            scores.plot(at, [_number(row[kind][key]) for row in evaluations], style, label=f"{label} {key.upper()}")
    scores.set(title="average precision", ylim=(0, 1), xlim=(0, x[-1]))
    if evaluations:
        scores.legend(fontsize="small")
    speed.plot(*thinned(x, _column(steps, "images_per_s")))
    speed.set(title="images/s", ylim=(0, None))
    rate.plot(*thinned(x, _column(steps, "lr")))
    rate.set(title="learning rate", ylim=(0, None), xlabel="step")
    speed.set_xlabel("step")
    for panel in (losses, scores, speed, rate):
        panel.grid(alpha=0.3)
    return png(figure)


def draw_comparison(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG of the mask AP and box AP of several runs.

    Args:
        runs: rows of evaluations.jsonl by the run's name.
    """
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    for panel, kind, title in zip(figure.subplots(1, 2), ("segm", "bbox"), ("mask AP", "box AP")):
        for name, rows in runs.items():
            panel.plot([row["step"] for row in rows], [_number(row[kind]["ap"]) for row in rows], "o-", label=name)
        panel.set(title=title, xlabel="step", ylim=(0, None), xlim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    return png(figure)


def png(figure: Figure) -> bytes:
    """A figure as a file; the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def thinned(x: NDArray[np.float64], y: NDArray[np.float64], points: int = POINTS) -> tuple[NDArray[np.float64], ...]:
    """At most `points` means of neighbours; NaN (a step that was skipped) counts for nothing."""
    width = -(-len(x) // points)
    starts = np.arange(0, len(x), width)
    valid = np.isfinite(y)
    counts = np.add.reduceat(valid.astype(float), starts)
    sums = np.add.reduceat(np.where(valid, y, 0.0), starts)
    middle = np.add.reduceat(x, starts) / np.diff(starts, append=len(x))
    with np.errstate(invalid="ignore"):
        return middle, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    return np.array([_number(row[key]) for row in rows])


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
