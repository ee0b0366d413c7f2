"""Values with checked types: numbers given to the API as plain ones, which JSON can store, and JSON objects."""

import functools
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar, get_type_hints

from shards.common.errors import DatasetError
from shards.common.text import shown

T = TypeVar("T")
_types: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)  # a dataset has thousands of shards


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


def flat(kind: type[T], value: Any) -> T:
    """Return a dataclass whose fields are all `int` or `str`, from an object of exactly these; else ValueError."""
    name = kind.__name__.lower()
    types = _types(kind)
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise ValueError(f"a {name} is {shown(value)}, not an object of {', '.join(types)}")
    for key, wanted in types.items():
        if type(value[key]) is not wanted:  # bool is not accepted as int
            raise ValueError(f"{key} of a {name} is {shown(value[key])}, not of type {wanted.__name__}")
        if wanted is str and not is_text(value[key]):
            raise ValueError(f"{key} of a {name} is {shown(value[key])}, which is not valid Unicode")
    return kind(**value)


def is_text(value: str) -> bool:
    """Return whether a string can be encoded as UTF-8: JSON can contain lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
