"""The results of an evaluation as a text table, JSON values, and one CSV row per class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from shards.common.tables import text_table
from shards.common.text import counted
from shards.format.dataset import Category
from trainer.metrics.coco import SUMMARY, CocoResult
from trainer.metrics.confusion import Confusion
from trainer.metrics.openimages import GROUP, UNMASKED, UNVERIFIED, OpenImagesResult

TITLES = [("", "AP"), ("", "AP50"), ("", "AP75"), ("AP", "small"), ("AP", "medium"), ("AP", "large")]
TITLES += [("", "AR1"), ("", "AR10"), ("", "AR100"), ("AR", "small"), ("AR", "medium"), ("AR", "large")]
CLASS_TITLES = [("", "class"), ("", "objects"), ("", "masks"), ("COCO boxes", "AP"), ("COCO boxes", "AP50")]
CLASS_TITLES += [("COCO masks", "AP"), ("COCO masks", "AP50"), ("Open Images masks", "AP50")]
NOTHING, MISSED = "(nothing annotated)", "(nothing found)"
IGNORED = {  # by the Open Images AP, with what COCO's mask AP does instead
    UNMASKED: "on an object that has a box and no mask: errors by COCO's mask AP, unless they overlap a masked object",
    UNVERIFIED: "of a class that nobody verified in the image: errors by COCO, although they may be right",
    GROUP: "in a group-of region of the same class: COCO ignores them as well, at IoU 0.5",
}


@dataclass(frozen=True)
class Evaluation:
    """One set of detections evaluated by two metrics."""

    coco: CocoResult
    open_images: OpenImagesResult

    def to_json(self) -> dict[str, Any]:
        """Return plain values: `bbox` and `segm` are COCO's."""
        return {**self.coco.to_json(), "open_images": self.open_images.to_json()}


def summary(evaluation: Evaluation) -> str:
    """Return the evaluation as tables, in per cent."""
    coco = evaluation.coco
    images, objects = counted(coco.images, "image"), counted(coco.boxes, "object")
    kinds = {"boxes": coco.bbox, "masks": coco.segm}
    rows = [[kind, *(getattr(scores, name) for name in SUMMARY)] for kind, scores in kinds.items()]
    table = pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples([("", "COCO"), *TITLES]))
    lines = [f"{images}, {objects}, {coco.masks} with a mask, {counted(coco.detections, 'detection')}", ""]
    lines += [*text_table(table, dict.fromkeys(TITLES, in_percent)), "", *class_table(evaluation), ""]
    return "\n".join([*lines, *ignored_detections(evaluation)])


def class_scores(evaluation: Evaluation) -> pd.DataFrame:
    """Return COCO's and Open Images' results side by side, one row per class; missing where nothing is annotated."""
    coco, open_images = evaluation.coco, evaluation.open_images
    rows = [
        {
            "category_id": box.category_id,
            "name": box.name,
            "objects": box.objects,
            "masks": mask.objects,
            "box_ap": box.ap,
            "box_ap50": box.ap50,
            "mask_ap": mask.ap,
            "mask_ap50": mask.ap50,
            "open_images_ap": result.ap,
            "open_images_objects": result.objects,
            **result.outcomes,
        }
        for box, mask, result in zip(coco.bbox.classes, coco.segm.classes, open_images.classes, strict=True)
    ]
    return pd.DataFrame(rows)


def class_table(evaluation: Evaluation) -> list[str]:
    """Return the lines of a table of the classes and their mean."""
    box, mask = evaluation.coco.bbox, evaluation.coco.segm
    mean = ["mean", evaluation.coco.boxes, evaluation.coco.masks, box.ap, box.ap50, mask.ap, mask.ap50]
    table = class_scores(evaluation).loc[:, "name":"open_images_ap"]  # type: ignore[misc]
    table.loc[len(table)] = [*mean, evaluation.open_images.ap]
    table.columns = pd.MultiIndex.from_tuples(CLASS_TITLES)
    return text_table(table, dict.fromkeys(CLASS_TITLES[3:], in_percent))


def ignored_detections(evaluation: Evaluation) -> list[str]:
    """Return why COCO's mask AP and the Open Images AP differ, with the counts of this evaluation."""
    result = evaluation.open_images
    counts = {outcome: result.count(outcome) for outcome in IGNORED}
    once = ", counted once for each class of the hierarchy that they count for" if result.has_hierarchy else ""
    lines = [f"Detections that the Open Images AP leaves out{once}: {sum(counts.values())}"]
    lines += [f"  {count} {IGNORED[outcome]}" for outcome, count in counts.items() if count]
    if result.unverified_images:
        lines.append(
            f"{counted(result.unverified_images, 'image')} without verified labels: training takes the annotations as "
            "complete there; the Open Images AP leaves out detections of classes without an annotation"
        )
    if result.has_hierarchy:
        lines.append("The confusion matrix is of classes as annotated, without the hierarchy.")
    return lines


def class_csv(evaluation: Evaluation, categories: Sequence[Category]) -> str:
    """Return one CSV row per class; fractions from 0 to 1, empty where nothing is annotated."""
    table = class_scores(evaluation)
    table.insert(2, "mid", [category.mid for category in categories])
    return str(table.to_csv(index=False, lineterminator="\n"))


def confusion_csv(confusion: Confusion) -> str:
    """Return a CSV with a row per annotated class and a column per detected class."""
    table = pd.DataFrame(confusion.counts, [*confusion.names, NOTHING], [*confusion.names, MISSED])
    return str(table.to_csv(index_label="annotated / found", lineterminator="\n"))


def in_percent(value: float | None) -> str:
    """Return a fraction in per cent with one decimal, `-` for None."""
    return "-" if value is None else f"{100 * value:.1f}"
