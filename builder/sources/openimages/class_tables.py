"""The class names and the class hierarchy of Open Images."""

import csv
from collections import defaultdict

from shards.common.class_hierarchy import parse_hierarchy
from shards.common.errors import UserError


def parse_class_names(data: bytes, where: str) -> dict[str, str]:
    """Return a dict from MIDs to names, from lines `LabelName,DisplayName` with a header (since v6) or without (v5)."""
    names: dict[str, str] = {}
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error}): download it again") from error
    for number, row in enumerate(csv.reader(lines), start=1):
        if not any(row) or (number == 1 and not row[0].startswith("/")):
            continue
        if len(row) < 2 or not row[0].startswith("/"):
            text = ",".join(row)[:80]
            raise UserError(f"{where}: line {number} is {text!r}, not a MID and a name: download it again")
        names[row[0]] = row[1].strip()
    if not names:
        raise UserError(f"{where}: contains no class names: download it again")
    return names


def parse_children(data: bytes, where: str) -> dict[str, frozenset[str]]:
    """Return a dict from MIDs to their children by Subcategory, if any; see `parse_hierarchy` for errors."""
    children: dict[str, set[str]] = defaultdict(set)
    for node in parse_hierarchy(data, where):
        if node.ancestors:
            children[node.ancestors[-1]].add(node.label)
    return {label: frozenset(below) for label, below in children.items()}
