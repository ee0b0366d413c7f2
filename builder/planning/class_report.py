"""What selection gave each class, compared with its quota and with what the source offers."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from builder.sources.base import Candidates
from builder.tasks.plan import PlannedImage
from shards.common.text import counted
from shards.format.dataset import Category

FEW_MASKS = 20  # of a class in train, while most of its objects have none
MASKS_FROM_BOXES = (
    "classes with no or few masks learn them from boxes with --model.mask_head agnostic --loss.unmasked masks "
    "(recipe few-masks), then with maskstream fill: docs/masks-from-boxes.md"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClassReport:
    """Outcome of the selection for one class of one split.

    Attributes:
        asked: the quota in images; without a quota, all available images.
        available: images at the source that count for the class; `masked` of them have a mask of it.
        chosen: available images that were selected.
        masks, boxes: objects of the class in all selected images, including images selected for another class.
        reason: why the class got fewer images than its quota, or images without a mask of it; "" otherwise.
    """

    split: str
    name: str
    asked: int
    available: int
    masked: int
    chosen: int
    masks: int
    boxes: int
    reason: str = ""


def report_classes(
    split: str,
    categories: Iterable[Category],
    images: Sequence[PlannedImage],
    candidates: Mapping[int, Candidates],
    quota: int | None,
) -> list[ClassReport]:
    """Return a report without a reason per requested class, given a split's selected images and candidates."""
    chosen = {image.image_id for image in images}
    objects = [planned for image in images for planned in image.objects]
    boxes = Counter(planned.annotation.category_id for planned in objects)
    masks = Counter(planned.annotation.category_id for planned in objects if planned.has_mask)
    reports = []
    for category in categories:
        found = candidates.get(category.id, Candidates())
        reports.append(
            ClassReport(
                split=split,
                name=category.name,
                asked=len(found) if quota is None else quota,
                available=len(found),
                masked=len(found.masked),
                chosen=sum(image_id in chosen for image_id in (*found.masked, *found.boxed)),
                masks=masks[category.id],
                boxes=boxes[category.id],
            )
        )
    return reports


def without_masks(reports: Iterable[ClassReport]) -> list[ClassReport]:
    """Return the classes that have boxes and no mask, or hardly any, in the selected images of train."""
    of_train = [one for one in reports if one.split == "train" and one.boxes]
    return [one for one in of_train if not one.masks or one.masks < min(FEW_MASKS, one.boxes / 2)]


def warn_of_few_masks(reports: Iterable[ClassReport]) -> None:
    """Log the classes with no mask, and those with few; the report of the build says what to do, `MASKS_FROM_BOXES`."""
    found = without_masks(reports)
    none = [one.name for one in found if not one.masks]
    few = [f"{one.name} ({one.masks})" for one in found if one.masks]
    for what, names in (("no mask", none), ("few masks", few)):
        if names:
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            logger.warning(
                "%s in the selected images of train: %s (--list-classes counts the masks at the source)", what, shown
            )


def classes_held(images: Iterable[PlannedImage]) -> dict[int, Candidates]:
    """Return a dict from category ids to the given images that hold an object of the class."""
    found: dict[int, set[str]] = {}
    for image in images:
        for planned in image.objects:
            found.setdefault(planned.annotation.category_id, set()).add(image.image_id)
    return {category: Candidates(boxed=tuple(sorted(ids))) for category, ids in found.items()}


def explain_shortage(report: ClassReport, where: str, *, require_mask: bool) -> ClassReport:
    """Return the report with its reason; `where` names what was searched, such as "at the source"."""
    if report.available < report.asked:
        found, kind = report.available, f"{' with a mask' if require_mask else ''} {where}"
    elif report.masked < report.asked:
        found, kind = report.masked, f" with a mask {where}, others have boxes only"
    else:
        return report
    return replace(report, reason=(f"only {counted(found, 'image')}" if found else "no images") + kind)
