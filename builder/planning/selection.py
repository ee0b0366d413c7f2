"""Rules that select images: a quota per class and a partition into splits. Pure functions, stable under a seed."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from builder.sources.base import Candidates
from shards.format.dataset import SPLITS
from shards.format.shard_tar import seeded_order


@dataclass(frozen=True, slots=True)
class Quotas:
    """Images to select per class in train, and in each of val and test; None selects all that count for the class."""

    train: int | None = None
    evaluation: int | None = None

    def of(self, split: str) -> int | None:
        """Return the images per class of a split of the dataset."""
        return self.train if split == "train" else self.evaluation


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of the source's train split into train, val and test, by `fractions` of a positive sum."""

    fractions: tuple[float, float, float]
    seed: int

    def split_of(self, image_id: str) -> str:
        """Return the split of an image, which depends on nothing but the image, the fractions and the seed."""
        # Salted, because `seeded_order` hashes the same ids: unsalted, each part would be a stretch of that order.
        digest = hashlib.blake2b(f"{self.seed}:partition:{image_id}".encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "big") >> 12) / (1 << 52)  # 52 bits, in [0, 1)
        point, reached = uniform * sum(self.fractions), 0.0
        for split, fraction in zip(SPLITS, self.fractions, strict=True):
            reached += fraction
            if point < reached:
                return split
        # Rounding of the sum: the last split that is not empty.
        return next(split for split, fraction in zip(reversed(SPLITS), reversed(self.fractions)) if fraction > 0)


def select_images(
    candidates: Mapping[int, Candidates],
    quota: int | None,
    seed: int,
    *,
    taken: Collection[str] = (),
    barred: Collection[str] = (),
) -> list[str]:
    """Select images until each class has its quota, or all of its images.

    Masks first: a class takes images that only have boxes of it once those with masks run out. In each of the two
    passes the rarest class selects first, in seeded order. An image counts for every class that it holds.

    Args:
        candidates: images that count for each category id.
        quota: images per class; None for all of them.
        taken: images selected before, which count towards the quotas.
        barred: images that must not be selected and do not count; disjoint from `taken`.

    Returns:
        The newly selected images in seeded order.
    """
    chosen, closed = set(taken), frozenset(barred)
    eligible: dict[int, set[str]] = {category: set() for category in candidates}
    for kind in ("masked", "boxed"):
        images = {category: getattr(found, kind) for category, found in candidates.items()}
        for category in sorted(images, key=lambda category: (len(images[category]), category)):
            eligible[category].update(images[category])
            fresh = [image for image in images[category] if image not in chosen and image not in closed]
            missing = len(fresh) if quota is None else quota - len(eligible[category] & chosen)
            if missing > 0:
                chosen.update(seeded_order(fresh, seed)[:missing])
    return seeded_order(chosen.difference(taken), seed)
