"""Ancestors of a dataset's classes in the class hierarchy of Open Images."""

from collections.abc import Sequence

from shards.common.class_hierarchy import parse_hierarchy
from shards.common.errors import UserError
from shards.format.dataset import Category
from shards.storage.location import Location


def read_parents(location: Location, categories: Sequence[Category]) -> dict[int, tuple[int, ...]]:
    """Return category id -> sorted ids of its ancestors among the categories, without classes that have none.

    Categories are found in the hierarchy (see `parse_hierarchy`) by their MIDs; UserError if it contains none of them.
    """
    ids = {category.mid: category.id for category in categories}
    found: dict[int, set[int]] = {}
    for node in parse_hierarchy(location.read(), str(location)):
        if (own := ids.get(node.label)) is not None:
            ancestors = {ids[label] for label in node.ancestors if label in ids}
            found.setdefault(own, set()).update(ancestors - {own})
    if not found:
        raise UserError(
            f"{location}: none of the dataset's classes ({len(categories)}) is in this hierarchy, "
            f"such as {categories[0].mid!r}: is it the hierarchy of another dataset?"
        )
    return {child: tuple(sorted(ancestors)) for child, ancestors in sorted(found.items()) if ancestors}
