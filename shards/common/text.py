"""Text for messages and terminal output."""

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun, `1 image` or `2 images`; `many` is the plural if it is not `one` with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def printable(text: str) -> str:
    """Return text that is safe to print: characters that move the cursor or change direction are escaped."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def columns_of(text: str) -> int:
    """Return the width of text in terminal columns: wide East Asian characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(one) in ("W", "F") for one in text)
    return len(text) + wide - sum(unicodedata.combining(one) > 0 for one in text)


def one_line(text: object) -> str:
    """Return text, such as that of an error, with every run of white space as one space."""
    return " ".join(str(text).split())


def duration(seconds: float) -> str:
    """Return a duration as text: `48 s`, `7 min 5 s`, `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def shown(value: Any) -> str:
    """Return a value's repr for a message: on one line, at most 80 characters."""
    text = one_line(repr(value))
    return text if len(text) <= 80 else f"{text[:80]}..."


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", *, limit: int = 3) -> str:
    """Return `did you mean A or B?` with up to `limit` known names nearest to a wrong one, else `otherwise`.

    Similar names come first, then names that contain `name`, whatever their case.
    """
    wanted = name.casefold()
    names = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(wanted, names, n=limit, cutoff=0.5)
    if len(wanted) > 2:
        near += [one for one in names if wanted in one and one not in near]
    return f"did you mean {' or '.join(names[one] for one in near[:limit])}?" if near else otherwise
