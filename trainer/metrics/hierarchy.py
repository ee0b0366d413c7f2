"""Which of a dataset's classes are kinds of another, by Open Images' own tree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from shards.common.errors import UserError
from shards.format.dataset import Category
from shards.storage.location import Location


def read_parents(location: Location, categories: Sequence[Category]) -> dict[int, tuple[int, ...]]:
    """Category id -> ids of its ancestors among the categories, ascending; classes without any are left out.

    Args:
        location: `bbox_labels_600_hierarchy.json`, or `challenge-2019-label300-segmentable-hierarchy.json` (nodes of
            LabelName, Subcategory and Part; a Part is no kind of its whole).
        categories: the classes, joined by their MID.

    Raises:
        StorageError: the file cannot be read.
        UserError: it holds something else, or none of the categories.
    """
    ids = {category.mid: category.id for category in categories}
    found: dict[int, set[int]] = {}

    def walk(node: Any, above: frozenset[int]) -> None:
        own = ids.get(str(node["LabelName"]))
        if own is not None:
            found.setdefault(own, set()).update(above - {own})
        below = above if own is None else above | {own}
        for child in node.get("Subcategory", ()):
            walk(child, below)
        for part in node.get("Part", ()):
            walk(part, frozenset())

    try:
        walk(json.loads(location.read()), frozenset())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{location}: not Open Images' class hierarchy ({error!r}): download it anew") from error
    if not found:
        raise UserError(
            f"{location}: none of the dataset's classes ({len(categories)}) is in this hierarchy, "
            f"such as {categories[0].mid!r}: is it the hierarchy of another dataset?"
        )
    return {child: tuple(sorted(above)) for child, above in sorted(found.items()) if above}
