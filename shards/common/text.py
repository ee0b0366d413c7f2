"""Words of what commands tell."""

from __future__ import annotations

import unicodedata
from typing import Any


def counted(number: int, one: str, many: str = "") -> str:
    """A number with what it counts: `1 image`, `2 images`, `0 images`.

    Args:
        number: not negative.
        one: a thing.
        many: several of it, where that is not `one` and an s.
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def printable(text: str) -> str:
    """A text of the data as a terminal may have it: what moves the cursor or turns the direction is escaped."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def padded(text: str, columns: int) -> str:
    """A text with spaces after it, up to so many columns of a terminal."""
    return text + " " * (columns - columns_of(text))


def columns_of(text: str) -> int:
    """How wide a terminal writes a text: letters of East Asia take two columns, combining accents none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(one) in ("W", "F") for one in text)
    return len(text) + wide - sum(unicodedata.combining(one) > 0 for one in text)


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and cut short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."
