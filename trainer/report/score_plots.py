"""Plots of an evaluation: precision over recall, and the confusion matrix."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.drawing.overlay import hex_colour
from trainer.metrics.coco import RECALLS
from trainer.metrics.confusion import Confusion
from trainer.metrics.openimages import ClassResult
from trainer.report.scorecard import MISSED, NOTHING, Evaluation, in_percent
from trainer.run.plots import Figure, outline, png

NAMED_CURVES = 10  # classes with a colour and a name; the others are grey
MATRIX_CLASSES = 25  # most classes in the picture of the matrix; the CSV has all
MATRIX_NUMBERS = 12  # most classes for which the counts fit into the cells
LONGEST_NAME = 40  # characters of a class


def draw_precision_recall(evaluation: Evaluation) -> bytes:
    """Return a PNG of the precision of masks at IoU 0.5 over recall: COCO on the left, Open Images on the right."""
    figure = Figure(figsize=(14, 6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    coco, open_images = evaluation.coco.segm, evaluation.open_images
    title = f"COCO, masks at IoU 0.5: AP50 {in_percent(coco.ap50)}"
    _draw_curves(left, title, evaluation, coco.precision50, [one.ap50 for one in coco.classes])
    title = f"Open Images, masks at IoU 0.5: AP {in_percent(open_images.ap)}"
    curves = np.array([precision_curve(one) for one in open_images.classes])
    _draw_curves(right, title, evaluation, curves, [one.ap for one in open_images.classes])
    left.set_ylabel("precision, %")
    return png(figure)


def precision_curve(result: ClassResult) -> NDArray[np.float64]:
    """Return the precision envelope of a class, float64 [101]: the best precision at each recall or a higher one."""
    envelope = np.maximum.accumulate(result.precision[::-1])[::-1]
    return np.append(envelope, 0.0)[np.searchsorted(result.recall, RECALLS, side="left")]


def draw_confusion(confusion: Confusion) -> bytes:
    """Return a PNG of the matrix: shares of the annotated class, with counts where they fit."""
    weight = confusion.counts.sum(axis=0)[:-1] + confusion.counts.sum(axis=1)[:-1]
    chosen = np.sort(np.argsort(-weight, kind="stable")[:MATRIX_CLASSES])
    places = np.append(chosen, len(confusion.names))
    counts = confusion.counts[np.ix_(places, places)]
    names = [_shortened(confusion.names[k]) for k in chosen]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares[-1] = np.nan  # detections of nothing are no share of an annotated class: this row has counts only
    side = 2 + 0.45 * len(places) + 0.08 * max(map(len, [*names, NOTHING]))  # the names are at two sides
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    panel = figure.subplots()
    panel.set_facecolor("0.93")
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=panel, shrink=0.7, label="share of the objects of the class")
    ticks = np.arange(len(places))
    panel.set_xticks(ticks, [*names, MISSED], rotation=45, ha="right", rotation_mode="anchor")
    panel.set_yticks(ticks, [*names, NOTHING])
    _disable_math([*panel.get_xticklabels(), *panel.get_yticklabels()])
    left_out = len(confusion.names) - len(chosen)
    title = f"detections with a score of {confusion.score:g} or more,\nmatched at IoU 0.5"
    panel.set_title(title + (f"\n({left_out} rarer classes are in the CSV only)" if left_out else ""))
    panel.set(xlabel="predicted", ylabel="ground truth")
    if len(chosen) <= MATRIX_NUMBERS:
        for row, column in np.ndindex(counts.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            panel.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize="small")
    return png(figure)


def _draw_curves(
    panel: Any, title: str, evaluation: Evaluation, curves: NDArray[np.float64], aps: Sequence[float | None]
) -> None:
    """Draw the curves [C, 101] of the classes that have an AP, and their mean, in per cent."""
    classes, percent, recall = evaluation.coco.segm.classes, 100 * curves, 100 * RECALLS
    shown = [k for k, value in enumerate(aps) if value is not None]
    named = sorted(shown, key=lambda k: -classes[k].objects)[:NAMED_CURVES]
    for k in set(shown) - set(named):
        panel.plot(recall, percent[k], color="0.8", linewidth=0.7)
    # The light colours of the pages need an outline on white.
    style: dict[str, Any] = {"linewidth": 1.8, "path_effects": outline(3.2, "0.35")}
    lines = [panel.plot(recall, percent[k], color=hex_colour(classes[k].category_id), **style)[0] for k in named]
    if shown:
        lines += panel.plot(recall, percent[shown].mean(axis=0), color="black", linewidth=2.5)
        labels = [*(f"{_shortened(classes[k].name)} {in_percent(aps[k])}" for k in named), f"mean of {len(shown)}"]
        _disable_math(panel.legend(lines, labels, fontsize="small", loc="best").get_texts())
    panel.set(title=title, xlabel="recall, %", xlim=(0, 100), ylim=(0, 102))
    panel.grid(alpha=0.3)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _disable_math(texts: Sequence[Any]) -> None:
    """Show names of classes as they are: a dollar sign does not start a formula."""
    for text in texts:
        text.set_parse_math(False)
