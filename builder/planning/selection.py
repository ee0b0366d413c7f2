"""Which images: a quota a class, and which split. Pure, and stable under a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from builder.tasks.candidates import Candidates


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that looks random and depends on nothing but the text (blake2b, 52 bits)."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 12) / (1 << 52)


def seeded_order(image_ids: Iterable[str], seed: int) -> list[str]:
    """The images in the order of a seeded hash: any first n of them are a random sample."""

    def rank(image_id: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=16).digest(), image_id

    return sorted(image_ids, key=rank)


def select_images(
    candidates: Mapping[int, Candidates],
    quota: int | None,
    seed: int,
    *,
    taken: Collection[str] = (),
    barred: Collection[str] = (),
) -> list[str]:
    """Choose images until each class has its quota, or all of its images.

    Masks first: a class takes images with only boxes of it where those with masks run out. Among either kind the
    rarest class takes first, in seeded order; an image that is already taken counts for all of its classes.

    Args:
        candidates: category id -> images that count for it.
        quota: images a class; None for all of them.
        seed: of the order.
        taken: chosen before; they count.
        barred: not to be chosen, and not counted; none of `taken`.

    Returns:
        The newly chosen images in seeded order.
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


def partition_of(image_id: str, fractions: Sequence[float], seed: int) -> int:
    """Which part an image falls in: a function of image, fractions and seed alone, whatever else is chosen.

    Args:
        fractions: of the parts, each at least 0, with a positive sum.
    """
    # Salted: without it, parts and the seeded order would be cut from one hash, and a part be a stretch of the order.
    point = hash_fraction(f"{seed}:partition:{image_id}") * sum(fractions)
    reached = 0.0
    for part, fraction in enumerate(fractions):
        reached += fraction
        if point < reached:
            return part
    return max(part for part, fraction in enumerate(fractions) if fraction > 0)  # rounding of the sum
