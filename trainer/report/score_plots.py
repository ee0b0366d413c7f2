"""An evaluation in pictures: precision over recall, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer.metrics.coco import RECALLS
from trainer.metrics.confusion import Confusion
from trainer.metrics.openimages import ClassResult
from trainer.report.scorecard import MISSED, NOTHING, Evaluation
from trainer.run.plots import png

NAMED = 10  # classes with a colour and a name in the curves; the others are grey
LARGEST = 25  # classes in the picture of the matrix; the CSV has all
NUMBERED = 12  # up to so many classes there is room for the counts


def draw_precision_recall(evaluation: Evaluation) -> bytes:
    """A PNG of the masks' curves at IoU 0.5, COCO's on the left and Open Images' on the right."""
    figure = Figure(figsize=(14, 6), dpi=100, layout="constrained")
    coco, ours = evaluation.coco.segm, evaluation.open_images
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, title, curves, values in (
        (left, f"COCO, masks at IoU 0.5: AP50 {_percent(coco.ap50)}", coco.precision50, [c.ap50 for c in coco.classes]),
        (
            right,
            f"Open Images, masks at IoU 0.5: AP {_percent(ours.ap)}",
            np.array([read_curve(one) for one in ours.classes]),
            [c.ap for c in ours.classes],
        ),
    ):
        shown = [k for k, value in enumerate(values) if value is not None]
        named = sorted(shown, key=lambda k: -coco.classes[k].objects)[:NAMED]
        for k in set(shown) - set(named):
            panel.plot(RECALLS, curves[k], color="0.8", linewidth=0.7)
        lines = [panel.plot(RECALLS, curves[k], linewidth=1.5)[0] for k in named]
        if shown:
            panel.plot(RECALLS, curves[shown].mean(axis=0), color="black", linewidth=2.5)
        labels = [f"{coco.classes[k].name} {_percent(values[k])}" for k in named]
        _plain(panel.legend(lines, labels, fontsize="small", loc="best").get_texts() if lines else ())
        panel.set(title=title, xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    left.set_ylabel("precision (black: mean of the classes)")
    return png(figure)


def read_curve(result: ClassResult) -> NDArray[np.float64]:
    """The precision envelope of a class at RECALLS: the best precision at that recall or a higher one, else 0."""
    envelope = np.maximum.accumulate(result.precision[::-1])[::-1]
    places = np.searchsorted(result.recall, RECALLS, side="left")
    return np.append(envelope, 0.0)[places]


def draw_confusion(confusion: Confusion) -> bytes:
    """A PNG of the matrix: each row in shares of what is annotated, with counts where there is room for them."""
    weight = confusion.counts.sum(axis=0)[:-1] + confusion.counts.sum(axis=1)[:-1]
    chosen = np.sort(np.argsort(-weight, kind="stable")[:LARGEST])
    places = np.append(chosen, len(confusion.names))
    counts = confusion.counts[np.ix_(places, places)]
    names = [confusion.names[k] for k in chosen]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 3.5 + 0.45 * len(places)
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=panel, shrink=0.7, label="share of the row")
    ticks = np.arange(len(places))
    panel.set_xticks(ticks, [*names, MISSED], rotation=45, ha="right", rotation_mode="anchor")
    panel.set_yticks(ticks, [*names, NOTHING])
    _plain([*panel.get_xticklabels(), *panel.get_yticklabels()])
    left_out = len(confusion.names) - len(chosen)
    title = f"detections of score {confusion.score:g} or more, paired at IoU 0.5"
    panel.set_title(title + (f"\n({left_out} rarer classes are in the CSV only)" if left_out else ""))
    panel.set(xlabel="found", ylabel="annotated")
    if len(chosen) <= NUMBERED:
        for row, column in np.ndindex(counts.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            panel.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize="small")
    return png(figure)


def _plain(texts: Sequence[object]) -> None:
    """Names of classes are shown as they are: a dollar sign starts no formula."""
    for text in texts:
        text.set_parse_math(False)  # type: ignore[attr-defined]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
