"""Class names and the hierarchy: from what a user asks for to the labels that count for it."""

from __future__ import annotations

import csv
import difflib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.fetch import Request, fetch_one
from builder.openimages import OpenImages
from shards.dataset import Category
from shards.errors import UserError
from shards.storage import Location


@dataclass(frozen=True)
class Classes:
    """The chosen classes.

    Attributes:
        categories: ids 1 to N in the order in which they were asked for.
        owners: label (MID) -> id of the category that its objects belong to.
        kinds: category id -> the labels whose presence is the class's presence (itself, and its children).
        ancestors: category id -> the labels whose absence is the class's absence (itself, and its parents).
    """

    categories: tuple[Category, ...]
    owners: Mapping[str, int]
    kinds: Mapping[int, frozenset[str]]
    ancestors: Mapping[int, frozenset[str]]

    @property
    def verifiable(self) -> tuple[str, ...]:
        """Every label whose verification says something about a chosen class, sorted."""
        return tuple(sorted(frozenset().union(*self.kinds.values(), *self.ancestors.values())))

    def verified(
        self, present: frozenset[str], absent: frozenset[str], annotated: frozenset[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Category ids that are verified present and verified absent in an image, each ascending.

        Args:
            present, absent: labels that annotators confirmed or ruled out.
            annotated: category ids that have an object in the image; such a class is not called absent.
        """
        here = [c.id for c in self.categories if self.kinds[c.id] & present]
        gone = [
            c.id
            for c in self.categories
            if self.ancestors[c.id] & absent and c.id not in here and c.id not in annotated
        ]
        return tuple(here), tuple(gone)


@dataclass(frozen=True)
class Taxonomy:
    """All classes of the source.

    Attributes:
        names: MID -> display name.
        children: MID -> MIDs that are kinds of it (Subcategory; a Part is not a kind).
    """

    names: Mapping[str, str]
    children: Mapping[str, frozenset[str]]

    def subtree(self, mid: str) -> frozenset[str]:
        """The class, its children, their children and so on."""
        return _reachable(mid, self.children)

    def find(self, wanted: str) -> str:
        """The MID of a class given as a name (any case) or as a MID.

        Raises:
            UserError: there is no such class, or several have the name.
        """
        if wanted in self.names:
            return wanted
        key = " ".join(wanted.casefold().split())
        found = [mid for mid, name in self.names.items() if name.casefold() == key]
        if len(found) > 1:
            raise UserError(f"class {wanted!r}: several classes have this name: give a MID, one of {', '.join(found)}")
        if found:
            return found[0]
        names = {name.casefold(): name for name in self.names.values()}
        near = difflib.get_close_matches(key, names, n=3, cutoff=0.6)
        near += [name for name in names if key and key in name and name not in near][:3]
        hint = f"did you mean {', '.join(repr(names[name]) for name in near)}?" if near else "no name is near"
        raise UserError(
            f"unknown class {wanted!r}: {hint} (quote names with spaces; the names are Open Images' "
            f"{len(self.names)} boxable classes, or their MIDs such as /m/01g317)"
        )

    def choose(self, wanted: Sequence[str], *, exact: bool = False) -> Classes:
        """The classes that a user asks for, with the labels that count for each.

        A label below several chosen classes belongs to the most specific of them: of Person and Man, a Man is a Man.

        Args:
            wanted: names or MIDs.
            exact: children do not count: a Man is not a Person.

        Raises:
            UserError: an unknown class, or one that is asked for twice.
        """
        mids = [self.find(name) for name in wanted]
        for position, mid in enumerate(mids):
            if mid in mids[:position]:
                raise UserError(f"class {wanted[position]!r} is asked for twice: name it once")
        subtrees = {mid: frozenset([mid]) if exact else self.subtree(mid) for mid in mids}
        owners: dict[str, int] = {}
        # A descendant's subtree is smaller than its ancestor's, so the smallest subtree is the most specific class.
        by_size = sorted(range(len(mids)), key=lambda i: len(subtrees[mids[i]]))
        for i in by_size:
            for label in sorted(subtrees[mids[i]]):
                owners.setdefault(label, i + 1)
        parents: dict[str, set[str]] = defaultdict(set)
        for parent, children in self.children.items():
            for child in children:
                parents[child].add(parent)
        return Classes(
            categories=tuple(Category(i + 1, self.names[mid], mid) for i, mid in enumerate(mids)),
            owners=owners,
            kinds={i + 1: subtrees[mid] for i, mid in enumerate(mids)},
            ancestors={i + 1: _reachable(mid, parents) for i, mid in enumerate(mids)},
        )


def read_taxonomy(source: OpenImages) -> Taxonomy:
    """Read class names and hierarchy.

    Raises:
        UserError: a file is not what it should be.
        StorageError: a file cannot be had.
    """
    names = parse_class_names(_text(source.class_names), str(source.class_names))
    return Taxonomy(names, parse_hierarchy(_text(source.hierarchy), str(source.hierarchy)))


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


def parse_hierarchy(text: str, where: str) -> dict[str, frozenset[str]]:
    """MID -> its children by Subcategory. A Part is walked through, for it may have kinds of its own, but is no child.

    Raises:
        UserError: not the JSON tree of `LabelName`, `Subcategory` and `Part`.
    """
    children: dict[str, set[str]] = defaultdict(set)

    def walk(node: Any) -> str:
        label = str(node["LabelName"])
        for child in node.get("Subcategory", ()):
            children[label].add(walk(child))
        for part in node.get("Part", ()):
            walk(part)
        return label

    try:
        walk(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: not Open Images' class hierarchy ({error!r}): download it anew") from error
    return {label: frozenset(below) for label, below in children.items()}


def _reachable(start: str, edges: Mapping[str, Iterable[str]]) -> frozenset[str]:
    found, to_visit = {start}, [start]
    while to_visit:
        for label in edges.get(to_visit.pop(), ()):
            if label not in found:
                found.add(label)
                to_visit.append(label)
    return frozenset(found)


def _text(location: Location) -> str:
    try:
        return fetch_one(Request(location)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: not UTF-8 text ({error}): download it anew") from error
