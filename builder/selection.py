"""Which images: a quota a class, and which split. Pure, and stable under a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that looks random and depends on nothing but the text (blake2b, 52 bits)."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 12) / (1 << 52)


def seeded_order(image_ids: Iterable[str], seed: int) -> list[str]:
    """The images in the order of a seeded hash: any first n of them are a random sample."""

    def rank(image_id: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=16).digest(), image_id

    return sorted(image_ids, key=rank)


def select_images(images_by_class: Mapping[int, Collection[str]], quota: int, seed: int) -> list[str]:
    """Choose images until each class has its quota, or all of its images.

    The rarest class chooses first, in seeded order; an image that is already chosen counts for all of its classes.

    Args:
        images_by_class: category id -> images that count for it.
        quota: images a class.
        seed: of the order.

    Returns:
        The chosen images in seeded order.
    """
    chosen: set[str] = set()
    for _, _, images in sorted((len(images), category, images) for category, images in images_by_class.items()):
        missing = quota - sum(image in chosen for image in images)
        fresh = (image for image in seeded_order(images, seed) if image not in chosen)
        chosen.update(image for _, image in zip(range(missing), fresh))
    return seeded_order(chosen, seed)


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
