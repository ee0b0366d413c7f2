"""`--list-classes`: the classes of a source, and what it has of each."""

import json
from dataclasses import asdict
from typing import Any

import pandas as pd

from builder.sources.base import ClassTotals, Filters, Source
from shards.common.tables import text_table
from shards.common.text import counted

KINDS = ("images", "masks", "boxes")


def list_classes(source: Source, names: list[str], *, exact: bool, as_json: bool) -> str:
    """Return a report of the classes with these names, with their children unless `exact`; without names, of all.

    UserError for an unknown name or damaged annotations, StorageError if these cannot be read. Images are not needed.
    """
    classes = source.taxonomy().choose(names, exact=exact)
    found: dict[str, list[ClassTotals]] = {}
    for split, name in source.splits.items():
        of_class = source.open_split(name, classes, Filters()).totals()
        found[split] = [of_class.get(one.id, ClassTotals()) for one in classes.categories]
    class_names = [one.name for one in classes.categories]
    if as_json:
        value = {split: dict(zip(class_names, map(asdict, totals), strict=True)) for split, totals in found.items()}
        return json.dumps(value, indent=2)
    columns: dict[tuple[str, str], list[Any]] = {("", "class"): class_names}
    for split, totals in found.items():
        columns |= {(split, kind): [getattr(one, kind) for one in totals] for kind in KINDS}
    lines = text_table(pd.DataFrame(columns))
    for split, totals in found.items():
        with_masks = sum(one.masks > 0 for one in totals)
        lines.append(f"{split}: {counted(len(totals), 'class', 'classes')}, {with_masks} with masks")
    lines.append("images: with an object of the class; boxes: all objects, with or without a mask")
    if not names:
        lines.append("each class without its children; `--classes NAME ...` counts these, as a build does")
    return "\n".join(lines)
