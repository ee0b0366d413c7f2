"""Class names and their hierarchy: from the names that a user requests to the labels that count for each class."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from shards.common.errors import UserError
from shards.common.text import did_you_mean
from shards.format.dataset import Category


@dataclass(frozen=True)
class Classes:
    """The chosen classes.

    Attributes:
        categories: Ids 1 to N in the order of the request, followed by any other classes in the order of their names.
        requested: How many of the categories were requested by name.
        owners: Label (MID) -> id of the category that its objects belong to.
        descendants: Category id -> the labels whose presence implies the class: its own and those of its children.
        ancestors: Category id -> the labels whose absence rules out the class: its own and those of its parents.
    """

    categories: tuple[Category, ...]
    requested: int
    owners: Mapping[str, int]
    descendants: Mapping[int, frozenset[str]]
    ancestors: Mapping[int, frozenset[str]]

    @property
    def wanted(self) -> tuple[Category, ...]:
        """The requested classes, which have quotas."""
        return self.categories[: self.requested]

    @property
    def wanted_labels(self) -> tuple[str, ...]:
        """Every label that counts for a requested class, sorted."""
        return tuple(sorted(label for label, owner in self.owners.items() if owner <= self.requested))

    @property
    def verifiable(self) -> tuple[str, ...]:
        """Every label whose verification says something about a chosen class, sorted."""
        return tuple(sorted(frozenset().union(*self.descendants.values(), *self.ancestors.values())))

    def holding(self, labels: frozenset[str]) -> tuple[int, ...]:
        """Return the category ids of the classes that have one of the labels, of their own or of a child, ascending."""
        return _ids(self._by_descendant, labels)

    def verified(
        self, present: frozenset[str], absent: frozenset[str], annotated: frozenset[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the category ids that are verified present and verified absent in an image, each ascending.

        `present` and `absent` are labels that annotators confirmed and ruled out; classes with an object in the image,
        `annotated`, are never absent.
        """
        here = self.holding(present)
        gone = _ids(self._by_ancestor, absent)
        return here, tuple(category for category in gone if category not in here and category not in annotated)

    # Inverted, because a source may have a million images, and thousands of classes.
    @cached_property
    def _by_descendant(self) -> Mapping[str, list[int]]:
        return _inverted(self.descendants)

    @cached_property
    def _by_ancestor(self) -> Mapping[str, list[int]]:
        return _inverted(self.ancestors)


def _inverted(labels: Mapping[int, frozenset[str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for category, own in labels.items():
        for label in own:
            found[label].append(category)
    return found


def _ids(by_label: Mapping[str, list[int]], labels: Iterable[str]) -> tuple[int, ...]:
    return tuple(sorted({category for label in labels for category in by_label.get(label, ())}))


@dataclass(frozen=True)
class Taxonomy:
    """All classes of a source.

    Attributes:
        names: MID (or whatever the source identifies a class by) -> display name.
        children: MID -> MIDs of its subcategories.
        groups: MIDs that only group subcategories, and that no object has.
        source: Where the names come from, for messages.
    """

    names: Mapping[str, str]
    children: Mapping[str, frozenset[str]]
    groups: frozenset[str] = frozenset()
    source: str = "Open Images' boxable classes, or their MIDs such as /m/01g317"

    def find(self, wanted: str) -> str:
        """Return the MID of a class given by name, in any case, or MID; UserError if none or several have the name."""
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
        """Return the requested classes with the labels that count for each; UserError for an unknown or repeated name.

        A label under several requested classes belongs to the most specific of them: with Person and Man, an object
        labelled Man belongs to Man.

        Args:
            wanted: Names or MIDs; none for all classes in the order of their names, each without its children.
            exact: Children do not count for their parents: a Man is not a Person.
            others: Add a class for every label that counts for none of the requested classes, whether it occurs or
                not, so that ids do not depend on the chosen images.
        """
        by_name = sorted(self.names.keys() - self.groups, key=lambda mid: (self.names[mid], mid))
        mids = [self.find(name) for name in wanted] or by_name
        for position, mid in enumerate(mids):
            if mid in mids[:position]:
                raise UserError(f"class {wanted[position]!r} is requested twice: name it once")
        requested = len(mids)

        def labels_of(mid: str) -> frozenset[str]:
            return frozenset([mid]) if exact else reachable(mid, self.children)

        owners: dict[str, int] = {}
        # A descendant has a smaller subtree than its ancestors: the most specific classes come first.
        for i in sorted(range(requested), key=lambda i: len(labels_of(mids[i]))):
            for label in labels_of(mids[i]):
                owners.setdefault(label, i + 1)
        if others:
            mids += [mid for mid in by_name if mid not in owners]
            owners |= {mid: i + 1 for i, mid in enumerate(mids) if i >= requested}
        parents: dict[str, set[str]] = defaultdict(set)
        for parent, children in self.children.items():
            for child in children:
                parents[child].add(parent)
        return Classes(
            categories=tuple(Category(i + 1, self.names[mid], mid) for i, mid in enumerate(mids)),
            requested=requested,
            owners=owners,
            descendants={i + 1: labels_of(mid) for i, mid in enumerate(mids)},
            ancestors={i + 1: reachable(mid, parents) for i, mid in enumerate(mids)},
        )


def reachable(start: str, edges: Mapping[str, Iterable[str]]) -> frozenset[str]:
    """Return a node and all that follow it along the edges, cycles or not."""
    found, to_visit = {start}, [start]
    while to_visit:
        fresh = set(edges.get(to_visit.pop(), ())) - found
        found |= fresh
        to_visit += fresh
    return frozenset(found)
