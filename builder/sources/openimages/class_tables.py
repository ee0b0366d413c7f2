"""The class names and the class hierarchy of Open Images."""

from __future__ import annotations

import csv
from collections import defaultdict

from builder.fetching.fetch import Request, fetch_all
from builder.sources.openimages.layout import Layout
from builder.sources.taxonomy import Taxonomy
from shards.common.class_hierarchy import parse_hierarchy
from shards.common.errors import UserError
from shards.storage.location import Location


def read_taxonomy(layout: Layout) -> Taxonomy:
    """Read Open Images' class names and hierarchy.

    Raises:
        UserError: a file is not what it should be.
        StorageError: a file cannot be had.
    """
    places = layout.class_names, layout.hierarchy
    contents = fetch_all([Request(place) for place in places])
    names, hierarchy = (_text(content, place) for content, place in zip(contents, places, strict=True))
    return Taxonomy(parse_class_names(names, str(places[0])), parse_children(hierarchy, str(places[1])))


def parse_class_names(text: str, where: str) -> dict[str, str]:
    """MID -> display name from `LabelName,DisplayName` lines, with a header (v6 and later) or without (v5).

    Raises:
        UserError: a line that is not a MID and a name.
    """
    names: dict[str, str] = {}
    for number, row in enumerate(csv.reader(text.splitlines()), start=1):
        if not any(row) or (number == 1 and not row[0].startswith("/")):
            continue
        if len(row) < 2 or not row[0].startswith("/"):
            raise UserError(f"{where}: line {number} is {','.join(row)[:80]!r}, not a MID and a name: download it anew")
        names[row[0]] = row[1].strip()
    if not names:
        raise UserError(f"{where}: holds no class names: download it anew")
    return names


def parse_children(text: str, where: str) -> dict[str, frozenset[str]]:
    """Return the children by Subcategory of each MID that has any; see `parse_hierarchy`."""
    children: dict[str, set[str]] = defaultdict(set)
    for node in parse_hierarchy(text, where):
        if node.ancestors:
            children[node.ancestors[-1]].add(node.label)
    return {label: frozenset(below) for label, below in children.items()}


def _text(content: bytes, location: Location) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: not UTF-8 text ({error}): download it anew") from error
