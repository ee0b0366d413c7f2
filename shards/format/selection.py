"""Selecting a part of a dataset: samples and annotations, by the index alone.

What is not selected is never fetched. The selection is part of the index's fingerprint, and so of the order's identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.common.argument_checks import real, whole
from shards.common.errors import DatasetError
from shards.common.splitmix import fold, splitmix64
from shards.common.text import did_you_mean
from shards.format.index import Index
from shards.format.sample import Category, Sample


@dataclass(frozen=True, slots=True)
class Selection:
    """A part of a dataset: samples of some classes, without annotations of the others; and a fraction of those."""

    classes: tuple[int, ...] | None = None  # ids, ascending; None: all
    fraction: float = 1.0  # above 0 to 1
    seed: int = 0  # of the hash that chooses the fraction

    def __post_init__(self) -> None:
        real("fraction", self.fraction)
        object.__setattr__(self, "seed", whole("the seed of a selection", self.seed, 0))
        if not 0 < self.fraction <= 1:
            raise DatasetError(f"fraction is {self.fraction}: it must be above 0 and at most 1")

    def __str__(self) -> str:
        of = "all samples" if self.classes is None else "samples of these classes"
        return of if self.fraction == 1 else f"{of}, fraction {self.fraction:g} (seed {self.seed})"

    def narrowed(self, classes: tuple[int, ...] | None, fraction: float, seed: int, where: str) -> Selection:
        """Return some of the classes, and a fraction, of this selection; a DatasetError if it is a fraction already."""
        asked = Selection(classes, fraction, seed)
        if asked.fraction == 1:
            return replace(asked, fraction=self.fraction, seed=self.seed)
        if self.fraction < 1:
            # Ambiguous: it could be a share of the samples that are left, or of all.
            raise DatasetError(
                f"{where}: fraction {fraction} of a selection that is fraction {self.fraction} already: "
                "select once, with the fraction of the whole that is meant"
            )
        return asked


def find_class(categories: Sequence[Category], wanted: str | int, where: str) -> Category:
    """Return the class with a name (in any case), a MID or an id; a DatasetError with the nearest names if none has."""
    text = str(wanted)
    for matches in (
        lambda c: c.name == text,
        lambda c: c.name.casefold() == text.casefold(),
        lambda c: c.mid == text,
        lambda c: str(c.id) == text,
    ):
        for category in categories:
            if matches(category):
                return category
    names = [category.name for category in categories]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    hint = did_you_mean(text, names, f"it has {', '.join(names[:10])}{more}")
    raise DatasetError(f"{where}: there is no class {text!r}: {hint}")


def select_rows(index: Index, selection: Selection, where: str) -> Index:
    """Return the index of the selected samples; a DatasetError if there are none."""
    if selection.classes is not None:
        assert index.labels is not None, "an index of a dataset has labels"
        has = np.isin(index.labels.classes, selection.classes)
        index = index.take(np.flatnonzero(np.bincount(index.labels.samples[has], minlength=len(index))))
        index = replace(index, category_ids={number: number for number in selection.classes})
    if selection.fraction < 1:
        # In units of 2^-64. Floats next to 1 are inexact, which is negligible.
        limit = min(int(selection.fraction * 2**64), 2**64 - 1)
        index = index.take(np.flatnonzero(hash_keys(index.image_ids, selection.seed) < np.uint64(limit)))
    if selection != Selection() and len(index) == 0:
        raise DatasetError(f"{where}: no sample is selected: choose other classes or a larger fraction")
    return index


def hash_keys(image_ids: pa.Array, seed: int) -> NDArray[np.uint64]:
    """Return uint64 [N], a hash of each key and the seed; the same in any dataset that has the key.

    Splitmix64 over the key's ASCII bytes, eight at a time (little-endian, the last word padded with zeros).
    """
    hashes = np.full(len(image_ids), fold(seed), dtype=np.uint64)
    width = -(-int(pc.max(pc.binary_length(image_ids)).as_py() or 1) // 8) * 8 if len(image_ids) else 8
    padded = pc.utf8_rpad(image_ids, width=width, padding="\0")
    characters = np.frombuffer(padded.buffers()[2], dtype=np.uint8, count=width * len(image_ids))
    for word in characters.view("<u8").reshape(-1, width // 8).T:
        # A word of zeros is padding, so that the hash does not depend on the longest key.
        hashes = np.where(word == 0, hashes, splitmix64(hashes ^ word))
    return hashes


def with_categories(sample: Sample, category_ids: Mapping[int, int] | None) -> Sample:
    """Return a sample of a shard with the ids of `Index.category_ids`; annotations of other categories are dropped."""
    if category_ids is None:
        return sample

    def renamed(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted(category_ids[number] for number in ids if number in category_ids))

    return replace(
        sample,
        instances=tuple(
            replace(instance, category_id=category_ids[instance.category_id])
            for instance in sample.instances
            if instance.category_id in category_ids
        ),
        verified_present=renamed(sample.verified_present),
        verified_absent=renamed(sample.verified_absent),
        not_exhaustive=renamed(sample.not_exhaustive),
    )
