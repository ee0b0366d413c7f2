"""Arguments of another type than they should be: one line that says what to give instead.

A loop of one's own has no command line that would have looked at them. They are made plain numbers of Python's, which
JSON knows, so that the identity of an order can be kept.
"""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

from shards.errors import DatasetError


def whole(name: str, value: Any) -> int:
    """A whole number: Python's, numpy's, or a tensor's.

    Raises:
        DatasetError: it is none; `name` is named.
    """
    try:
        return int(operator.index(value))
    except TypeError:
        hint = f", int({value!r})" if isinstance(value, str) and value.strip().isdecimal() else ""
        raise DatasetError(f"{name} is {value!r}: give a whole number{hint}") from None


def real(name: str, value: Any) -> float:
    """A number, whole or not.

    Raises:
        DatasetError: it is none; `name` is named.
    """
    if not isinstance(value, Real):
        raise DatasetError(f"{name} is {value!r}: give a number")
    return float(value)
