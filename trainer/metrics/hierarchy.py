"""Which of a dataset's classes are kinds of another, by Open Images' own tree."""

from __future__ import annotations

from collections.abc import Sequence

from shards.common.class_hierarchy import parse_hierarchy
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
    for node in parse_hierarchy(location.read(), str(location)):
        if (own := ids.get(node.label)) is not None:
            above = {ids[label] for label in node.ancestors if label in ids}
            found.setdefault(own, set()).update(above - {own})
    if not found:
        raise UserError(
            f"{location}: none of the dataset's classes ({len(categories)}) is in this hierarchy, "
            f"such as {categories[0].mid!r}: is it the hierarchy of another dataset?"
        )
    return {child: tuple(sorted(above)) for child, above in sorted(found.items()) if above}
