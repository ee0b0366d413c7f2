"""Numbers given to the API, of Python, numpy or torch, as plain numbers, which JSON can store."""

import operator
from numbers import Real
from typing import Any

from shards.common.errors import DatasetError
from shards.common.text import shown


def whole(name: str, value: Any, least: int | None = None) -> int:
    """Return an integer as an int; a DatasetError names the argument if it is not one, or less than `least`."""
    try:
        number = int(operator.index(value))
    except TypeError:
        raise DatasetError(f"{name} is {shown(value)}: give a whole number") from None
    if least is not None and number < least:
        raise DatasetError(f"{name} is {number}: it must be {f'at least {least}' if least else '0 or more'}")
    return number


def real(name: str, value: Any) -> float:
    """Return a real number as a float; a DatasetError names the argument if it is not one."""
    if not isinstance(value, Real):
        raise DatasetError(f"{name} is {shown(value)}: give a number")
    return float(value)
