"""JSON objects as dataclasses, with checked types: damage is found where a file is read, not where it is used."""

from typing import Any, TypeVar, get_type_hints

from shards.common.text import shown

T = TypeVar("T")


def flat(kind: type[T], value: Any) -> T:
    """Return a dataclass whose fields are all `int` or `str`, from an object of exactly these; else ValueError."""
    name = kind.__name__.lower()
    types = get_type_hints(kind)
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
