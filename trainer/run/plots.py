"""Plots of a run: losses, AP, images/s, the wait for data, and the learning rate over the steps."""

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from matplotlib.figure import Figure as Figure
except ValueError:
    # MPLBACKEND of a notebook's kernel, which its `!` commands inherit, names a backend of the notebook's environment.
    # Figures are drawn without any.
    os.environ.pop("MPLBACKEND")
    from matplotlib.figure import Figure as Figure

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl or evaluations.jsonl
Floats = NDArray[np.float64]

POINTS = 400  # most points per curve; each is the mean of several steps
SMOOTH_POINTS = 40  # of a smooth curve


def draw_curves(steps: Rows, evaluations: Rows, title: str = "") -> bytes:
    """Return a PNG of five panels from the rows of metrics.jsonl, at least one, and of evaluations.jsonl."""
    figure = Figure(figsize=(12, 9), dpi=100, layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.add_gridspec(6, 2)
    losses, scores = figure.add_subplot(grid[:3, 0]), figure.add_subplot(grid[:3, 1])
    rate = figure.add_subplot(grid[3:, 0])
    speed, waits = figure.add_subplot(grid[3:5, 1]), figure.add_subplot(grid[5:, 1])
    x = _column(steps, "step")
    _draw_smoothed(losses, x, _column(steps, "loss"), "black", "weighted sum")
    for number, name in enumerate(steps[0]["losses"]):
        values = _column([row["losses"] for row in steps], name)
        _draw_smoothed(losses, x, values, f"C{number}", name.removeprefix("loss_"))
    losses.set(title="losses", ylabel="loss", ylim=(0, None))
    losses.legend(fontsize="small")
    at, top = [row["step"] for row in evaluations], 0.0
    for name, style, score in _scores(evaluations):
        scores.plot(at, 100 * score, style, label=f"{name} {100 * score[-1]:.1f}")
        top = max(top, 100 * np.nanmax(score))
    # Not up to 100: the curve of the first evaluations would be flat.
    scores.set(title="evaluations (last value)", ylabel="AP, %", ylim=(0, max(1.1 * top, 2)), xlim=(0, 1.02 * x[-1]))
    if scores.lines:
        scores.legend(fontsize="small")
    _draw_smoothed(speed, x, _column(steps, "images_per_s"), "C0")
    speed.set(title="speed", ylabel="images/s", ylim=(0, None))
    _draw_smoothed(waits, x, 100 * _column(steps, "data_wait"), "C3")
    waits.set(ylabel="wait for\ndata, % of time", ylim=(0, 100))
    rate.plot(*downsampled(x, _column(steps, "lr")))
    rate.set(title="learning rate", ylabel="learning rate", ylim=(0, None))
    for panel in (losses, scores, rate, waits):
        panel.set_xlabel("step")
    for panel in (losses, scores, speed, waits, rate):
        panel.grid(alpha=0.3)
    return png(figure)


def _draw_smoothed(panel: Any, x: Floats, y: Floats, colour: str, label: str = "") -> None:
    """Draw a curve as it is, faint, and its mean over neighbouring steps."""
    panel.plot(*downsampled(x, y), color=colour, linewidth=0.8, alpha=0.25)
    panel.plot(*downsampled(x, y, SMOOTH_POINTS), color=colour, linewidth=1.5, label=label)


def draw_ap_curves(runs: Mapping[str, Rows]) -> bytes:
    """Return a PNG of the mask AP and box AP of several runs: rows of evaluations.jsonl by the run's name."""
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    for panel, kind, title in zip(figure.subplots(1, 2), ("segm", "bbox"), ("mask AP", "box AP")):
        for name, rows in runs.items():
            ap = _column([row[kind] for row in rows], "ap")
            panel.plot([row["step"] for row in rows], ap, "o-", label=name)
        panel.set(title=title, xlabel="step", ylim=(0, None), xlim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    return png(figure)


def outline(width: float, colour: str) -> list[Any]:
    """Return matplotlib's path effects for a line with an outline."""
    from matplotlib.patheffects import withStroke  # not at the top: matplotlib is imported there with care

    return [withStroke(linewidth=width, foreground=colour)]


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file; the same bytes for the same figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names of any script: the tables have them
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def downsampled(x: Floats, y: Floats, points: int = POINTS) -> tuple[Floats, Floats]:
    """Return at most `points` means of neighbouring points; NaN (a skipped step) is left out of the means."""
    width = -(-len(x) // points)
    starts = np.arange(0, len(x), width)
    valid = np.isfinite(y)
    counts = np.add.reduceat(valid.astype(float), starts)
    sums = np.add.reduceat(np.where(valid, y, 0.0), starts)
    middle = np.add.reduceat(x, starts) / np.diff(starts, append=len(x))
    with np.errstate(invalid="ignore"):
        return middle, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _scores(evaluations: Rows) -> list[tuple[str, str, Floats]]:
    """Return name, style and values of each AP's curve, without the curves that have no values."""
    found = [
        (f"{label} {key.upper()}", style, _column([row[kind] for row in evaluations], key))
        for kind, label in (("bbox", "box"), ("segm", "mask"))
        for key, style in (("ap", "o-"), ("ap50", "o:"))
    ]
    official = _column([row.get("open_images", {}) for row in evaluations], "ap")
    found.append(("mask AP50 of Open Images", "s--", official))
    return [curve for curve in found if np.isfinite(curve[2]).any()]


def _column(rows: Rows, key: str) -> Floats:
    """Return the values of a column; NaN where a row has none."""
    return np.array([row.get(key) for row in rows], dtype=float)
