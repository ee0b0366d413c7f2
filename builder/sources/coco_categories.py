"""The categories of a COCO file: the names of its classes, and the supercategory of each.

Exports of some tools begin with a category that nothing is annotated as. It only is the supercategory of the others,
and may have the name of one of them: it is no class of its own.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from builder.sources.taxonomy import reachable
from shards.common.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CocoCategory:
    """A category as the file has it; `parent` is the name of its supercategory, "" without one."""

    id: int
    name: str
    parent: str = ""


def arrange(
    categories: Sequence[CocoCategory], annotated: Collection[int], where: str
) -> tuple[dict[int, str], dict[str, str]]:
    """Return the names of the classes by id, in the file's order, and the supercategories of those that have one.

    `annotated` are the ids with annotations. A category without annotations that groups others, or that has the name of
    another one, is left out with a warning. UserError if two categories with annotations have one name.
    """
    kept: dict[str, CocoCategory] = {}
    roots: set[str] = set()
    for one in sorted(categories, key=lambda one: one.id not in annotated):  # of two with one name, the annotated first
        twin = kept.get(one.name)
        groups = any(other.parent == one.name and other.id != one.id for other in categories)
        if one.id in annotated and twin is not None:
            raise UserError(
                f"{where}: the categories {twin.id} and {one.id} are both named {one.name!r}, and both have "
                "annotations: rename one of them"
            )
        if twin is not None:
            logger.warning("%s: category %d, a second %r without annotations: left out", where, one.id, one.name)
        elif one.id not in annotated and groups:
            logger.warning(
                "%s: category %d, %r, only groups others and has no annotations: left out", where, one.id, one.name
            )
        else:
            kept[one.name] = one
            continue
        roots |= {one.name} if groups else set()
    # A supercategory of the name of a root and of a class is the root, whose children are not the class's.
    parents = {
        one.name: [one.parent]
        for one in kept.values()
        if one.parent not in ("", one.name) and not (one.parent in roots and one.parent in kept)
    }
    names = {one.id: one.name for one in categories if kept.get(one.name) is one}
    return names, {name: parent for name, found in without_cycles(parents, where).items() for parent in found}


def without_cycles(edges: Mapping[str, Collection[str]], where: str) -> dict[str, set[str]]:
    """Return a hierarchy, such as a dict from names to their parents, without the edges of cycles, with a warning."""
    good = {start: {end for end in ends if start not in reachable(end, edges)} for start, ends in edges.items()}
    if cyclic := sorted(start for start, ends in edges.items() if len(good[start]) < len(ends)):
        logger.warning("%s: supercategories go round in a circle: those of %s are ignored", where, ", ".join(cyclic))
    return good
