"""An evaluation's numbers for people and for programs: a table, JSON values, a CSV a class."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.common.text import counted
from shards.format.dataset import Category
from trainer.metrics.coco import SUMMARY, CocoResult
from trainer.metrics.confusion import Confusion
from trainer.metrics.openimages import GROUP, OUTCOMES, UNMASKED, UNVERIFIED, OpenImagesResult

TITLES = ("AP", "AP50", "AP75", "small", "medium", "large", "AR1", "AR10", "AR100", "small", "medium", "large")
NOTHING, MISSED = "(nothing annotated)", "(nothing found)"


@dataclass(frozen=True)
class Evaluation:
    """One set of detections by two metrics."""

    coco: CocoResult
    open_images: OpenImagesResult

    def to_json(self) -> dict[str, Any]:
        """Plain values: `bbox` and `segm` are COCO's."""
        return {**self.coco.to_json(), "open_images": self.open_images.to_json()}


def summary(evaluation: Evaluation) -> str:
    """The evaluation as a table for people, in per cent."""
    coco = evaluation.coco
    rated, objects = counted(coco.images, "image"), counted(coco.boxes, "object")
    lines = [f"{rated}, {objects}, {coco.masks} with a mask, {counted(coco.detections, 'detection')}", ""]
    lines.append(f"{'COCO':<16}" + "".join(f"{title:>7}" for title in TITLES))
    for name, scores in (("boxes", coco.bbox), ("masks", coco.segm)):
        lines.append(f"{name:<16}" + "".join(_percent(getattr(scores, column), 7) for column in SUMMARY))
    lines += ["", *class_table(evaluation), "", *differences(evaluation)]
    return "\n".join(lines)


def class_table(evaluation: Evaluation) -> list[str]:
    """COCO and Open Images side by side, a line a class."""
    coco, open_images = evaluation.coco, evaluation.open_images
    names = [entry.name for entry in coco.bbox.classes]
    width = max(16, *(len(name) + 2 for name in names)) if names else 16
    lines = [
        f"{'':<{width}}{'':>18}{'COCO boxes':>16}{'COCO masks':>16}{'Open Images masks':>20}",
        f"{'class':<{width}}{'objects':>9}{'masks':>9}" + f"{'AP':>8}{'AP50':>8}" * 2 + f"{'AP50':>20}",
    ]
    for name, box, mask, ours in zip(names, coco.bbox.classes, coco.segm.classes, open_images.classes, strict=True):
        numbers = "".join(_percent(v, 8) for v in (box.ap, box.ap50, mask.ap, mask.ap50))
        lines.append(f"{name:<{width}}{box.objects:>9}{mask.objects:>9}{numbers}{_percent(ours.ap, 20)}")
    numbers = "".join(_percent(v, 8) for v in (coco.bbox.ap, coco.bbox.ap50, coco.segm.ap, coco.segm.ap50))
    return [*lines, f"{'mean':<{width}}{coco.boxes:>9}{coco.masks:>9}{numbers}{_percent(open_images.ap, 20)}"]


def differences(evaluation: Evaluation) -> list[str]:
    """Why COCO's mask AP and the Open Images AP are not the same, with the numbers of this evaluation."""
    left_out = {outcome: evaluation.open_images.count(outcome) for outcome in (UNMASKED, UNVERIFIED, GROUP)}
    lines = [f"Detections that the Open Images AP leaves out: {sum(left_out.values())}"]
    if left_out[UNMASKED]:
        lines.append(
            f"  {left_out[UNMASKED]} on an object that has a box and no mask: COCO's mask AP counts each as an error, "
            "right as it is"
        )
    if left_out[UNVERIFIED]:
        lines.append(
            f"  {left_out[UNVERIFIED]} of a class that nobody verified in the image: COCO counts each as an error, "
            "though the object may be there"
        )
    if left_out[GROUP]:
        lines.append(f"  {left_out[GROUP]} in a group-of region of the same class: COCO leaves such out, too")
    return lines


def class_csv(evaluation: Evaluation, categories: Sequence[Category]) -> str:
    """A row a class; fractions from 0 to 1, empty where nothing is annotated."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    columns = ("category_id", "name", "mid", "objects", "masks", "box_ap", "box_ap50", "mask_ap", "mask_ap50")
    table.writerow([*columns, "open_images_ap", "open_images_objects", *OUTCOMES])
    coco = evaluation.coco
    for category, box, mask, ours in zip(
        categories, coco.bbox.classes, coco.segm.classes, evaluation.open_images.classes, strict=True
    ):
        scores = (box.ap, box.ap50, mask.ap, mask.ap50, ours.ap)
        counts = (ours.objects, *(ours.outcomes[outcome] for outcome in OUTCOMES))
        table.writerow([category.id, category.name, category.mid, box.objects, mask.objects, *scores, *counts])
    return buffer.getvalue()


def confusion_csv(confusion: Confusion) -> str:
    """A row for what is annotated, a column for what was found."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["annotated / found", *confusion.names, MISSED])
    for name, row in zip((*confusion.names, NOTHING), confusion.counts.tolist(), strict=True):
        table.writerow([name, *row])
    return buffer.getvalue()


def _percent(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(100 * value, '.1f'):>{width}}"
