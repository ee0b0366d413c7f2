"""Open Images' class hierarchy: a JSON tree of nodes with `LabelName`, `Subcategory` and `Part`.

Source: `bbox_labels_600_hierarchy.json` and `challenge-2019-label300-segmentable-hierarchy.json` of
https://storage.googleapis.com/openimages/web/download_v7.html
"""

import json
from typing import Any, NamedTuple

from shards.common.errors import UserError


class HierarchyNode(NamedTuple):
    """One node of the tree: its label, and the labels above it by `Subcategory`, from the root down.

    A label may occur at several nodes. A part is not a kind of its whole, so neither a part nor anything under it has
    the whole as an ancestor.
    """

    label: str
    ancestors: tuple[str, ...]


def parse_hierarchy(text: str | bytes, where: str) -> list[HierarchyNode]:
    """Return all nodes of a hierarchy, each after its ancestors; a UserError names the file `where`."""
    nodes: list[HierarchyNode] = []

    def visit(node: Any, ancestors: tuple[str, ...]) -> None:
        label = str(node["LabelName"])
        nodes.append(HierarchyNode(label, ancestors))
        for child in node.get("Subcategory", ()):
            visit(child, (*ancestors, label))
        for part in node.get("Part", ()):
            visit(part, ())

    try:
        visit(json.loads(text), ())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: not Open Images' class hierarchy ({error!r}): download it again") from error
    return nodes
