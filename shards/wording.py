"""Words of what commands tell."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """A number with what it counts: `1 image`, `2 images`, `0 images`.

    Args:
        number: not negative.
        one: a thing.
        many: several of it, where that is not `one` and an s.
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"
