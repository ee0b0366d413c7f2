"""The report of `inspect-shards`: counts as text, whose tables are pandas DataFrames, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shards.common.redact import redact_url
from shards.common.tables import percent, text_table
from shards.common.text import counted, printable
from shards.format.dataset import Dataset
from shards.inspect.statistics import FLAG_NAMES, SplitCounts, add_box_only, totals

if TYPE_CHECKING:
    import pandas as pd

MOST_BOX_ONLY = 5  # classes named at the end of the report


def text_report(dataset: Dataset, splits: Sequence[SplitCounts]) -> str:
    """Return the counts for people: a table of splits, a table of classes per split, classes with few masks."""
    plan = printable(dataset.info.plan[:16]) or "unknown"
    lines = [redact_url(str(dataset.root)), f"plan {plan}", "", *text_table(split_table(splits), {"portrait": percent})]
    for split in splits:
        lines += ["", split.split, *_class_lines(split)]
    return "\n".join([*lines, "", *_box_only_lines(totals(splits))])


def json_report(dataset: Dataset, splits: Sequence[SplitCounts]) -> str:
    """Return the counts as a JSON object."""
    about = {"root": redact_url(str(dataset.root)), "plan": dataset.info.plan}
    value = {**about, "splits": [split.to_json() for split in splits]}
    return json.dumps(value, indent=2, ensure_ascii=False)


def split_table(splits: Sequence[SplitCounts]) -> pd.DataFrame:
    """Return one row per split; sizes in pixels, portrait from 0 to 1, both missing where a split has no images."""
    import pandas as pd

    rows = []
    for split in splits:
        row = {"split": split.split, "images": split.images, "shards": split.shards, "MB": split.nbytes / 1e6}
        if split.sizes is not None:
            (least_w, width, most_w), (least_h, height, most_h) = split.sizes.width, split.sizes.height
            row |= {"median size": f"{width}x{height}", "width": f"{least_w} to {most_w}"}
            row |= {"height": f"{least_h} to {most_h}", "portrait": split.sizes.portrait}
        rows.append(row)
    return pd.DataFrame(rows)


def class_table(split: SplitCounts) -> pd.DataFrame:
    """Return one row per class that occurs in a split; box only, present and absent from 0 to 1.

    Predicted masks have a column if there are any.
    """
    import pandas as pd

    classes = add_box_only(split.classes[split.classes["images"] > 0])
    names = {"name": "class", "box_only_share": "box only", "groups": "group-of"}
    predicted = ["predicted"] if classes["predicted"].any() else []
    columns = ["id", "name", "images", "boxes", "masks", *predicted, "box_only_share", "groups"]
    table = classes[columns].rename(columns=names)
    if split.labels is not None:
        verified = pd.DataFrame(split.labels.classes, index=["present", "absent"]).T / split.labels.images
        table = table.join(verified, on="id").fillna({"present": 0, "absent": 0})
    return table.drop(columns="id")


def _class_lines(split: SplitCounts) -> list[str]:
    """Return the table of the classes of one split, and notes on it."""
    lines = text_table(class_table(split), dict.fromkeys(("box only", "present", "absent"), percent), indent="  ")
    if missing := int((split.classes["images"] == 0).sum()):
        lines.append(f"  (in no image: {counted(missing, 'more class', 'more classes')})")
    if split.labels is not None:
        labels = split.labels
        flags = "".join(f", {labels.flags[flag]} {name}" for flag, name in FLAG_NAMES.items() if labels.flags[flag])
        of = "all images" if labels.images == split.images else f"a random {labels.images} of the {split.images} images"
        objects = counted(labels.objects, "annotation")
        lines.append(f"  verified as present, as absent: share of {of}; {objects} in them{flags}")
    return lines


def _box_only_lines(classes: pd.DataFrame) -> list[str]:
    """Name the classes with the most objects that have no mask, and explain the columns."""
    gaps = classes[classes["box_only"] > 0].sort_values("box_only", ascending=False, kind="stable")
    lines = [
        f"{printable(row.name)}: {row.box_only_share:.0%} of objects have a box only ({row.box_only} of {row.objects})"
        for row in gaps.head(MOST_BOX_ONLY).itertuples(index=False)
    ]
    if (more := len(gaps) - MOST_BOX_ONLY) > 0:
        lines.append(counted(more, "more class has such objects", "more classes have such objects"))
    if len(gaps):
        lines.append("box only: trains class and box, but no mask; COCO's mask AP counts its detection as an error")
    if classes["predicted"].any():
        what = "masks that a trained model predicted, for training only"
        lines.append(f"predicted: {what}; evaluation takes their objects for box only")
    return [*lines, "boxes: all annotations; group-of: regions of several objects, which are not counted in box only"]
