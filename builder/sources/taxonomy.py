"""Class names and the hierarchy: from what a user asks for to the labels that count for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shards.common.errors import UserError
from shards.common.text import did_you_mean
from shards.format.dataset import Category


@dataclass(frozen=True)
class Classes:
    """The chosen classes.

    Attributes:
        categories: ids 1 to N in the order in which they were asked for; with every other class as well, these follow
            in the order of their names.
        asked: how many of the categories were asked for.
        owners: label (MID) -> id of the category that its objects belong to.
        kinds: category id -> the labels whose presence is the class's presence (itself, and its children).
        ancestors: category id -> the labels whose absence is the class's absence (itself, and its parents).
    """

    categories: tuple[Category, ...]
    asked: int
    owners: Mapping[str, int]
    kinds: Mapping[int, frozenset[str]]
    ancestors: Mapping[int, frozenset[str]]

    @property
    def wanted(self) -> tuple[Category, ...]:
        """The classes that were asked for, which have quotas."""
        return self.categories[: self.asked]

    @property
    def wanted_labels(self) -> tuple[str, ...]:
        """Every label that counts for a class that was asked for, sorted."""
        return tuple(sorted(label for label, owner in self.owners.items() if owner <= self.asked))

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
        names: MID (or what else the source calls a class by) -> display name.
        children: MID -> MIDs that are kinds of it (Subcategory; a Part is not a kind).
        groups: names that only hold kinds together, and that no object carries.
        source: whose names these are, for messages.
    """

    names: Mapping[str, str]
    children: Mapping[str, frozenset[str]]
    groups: frozenset[str] = frozenset()
    source: str = "Open Images' boxable classes, or their MIDs such as /m/01g317"

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
        hint = did_you_mean(key, self.names.values(), "no name is near")
        raise UserError(
            f"unknown class {wanted!r}: {hint} (quote names with spaces; the {len(self.names)} names are {self.source})"
        )

    def choose(self, wanted: Sequence[str], *, exact: bool = False, others: bool = False) -> Classes:
        """The classes that a user asks for, with the labels that count for each.

        A label below several chosen classes belongs to the most specific of them: of Person and Man, a Man is a Man.

        Args:
            wanted: names or MIDs; none for all classes, in the order of their names, each by itself.
            exact: children do not count: a Man is not a Person.
            others: every label that counts for none of the wanted classes becomes a class of its own, after them. All
                of the source's, whether they occur or not: so an id means the same whatever images are chosen.

        Raises:
            UserError: an unknown class, or one that is asked for twice.
        """
        by_name = sorted(self.names.keys() - self.groups, key=lambda mid: (self.names[mid], mid))
        mids = [self.find(name) for name in wanted] or by_name
        for position, mid in enumerate(mids):
            if mid in mids[:position]:
                raise UserError(f"class {wanted[position]!r} is asked for twice: name it once")
        asked = len(mids)
        subtrees = {mid: frozenset([mid]) if exact else self.subtree(mid) for mid in mids}
        owners: dict[str, int] = {}
        # A descendant's subtree is smaller than its ancestor's, so the smallest subtree is the most specific class.
        by_size = sorted(range(len(mids)), key=lambda i: len(subtrees[mids[i]]))
        for i in by_size:
            for label in sorted(subtrees[mids[i]]):
                owners.setdefault(label, i + 1)
        if others:
            mids += [mid for mid in by_name if mid not in owners]
            owners |= {mid: i + 1 for i, mid in enumerate(mids) if i >= asked}
            subtrees |= {mid: frozenset([mid]) if exact else self.subtree(mid) for mid in mids[asked:]}
        parents: dict[str, set[str]] = defaultdict(set)
        for parent, children in self.children.items():
            for child in children:
                parents[child].add(parent)
        return Classes(
            categories=tuple(Category(i + 1, self.names[mid], mid) for i, mid in enumerate(mids)),
            asked=asked,
            owners=owners,
            kinds={i + 1: subtrees[mid] for i, mid in enumerate(mids)},
            ancestors={i + 1: _reachable(mid, parents) for i, mid in enumerate(mids)},
        )


def _reachable(start: str, edges: Mapping[str, Iterable[str]]) -> frozenset[str]:
    found, to_visit = {start}, [start]
    while to_visit:
        for label in edges.get(to_visit.pop(), ()):
            if label not in found:
                found.add(label)
                to_visit.append(label)
    return frozenset(found)
