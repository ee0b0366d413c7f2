"""Values of options, from YAML or from one argument of a command line, converted to the type of their field."""

import contextlib
import dataclasses
import typing
from collections.abc import Collection
from typing import Any, Literal

import yaml

from shards.common.errors import UserError
from shards.common.text import did_you_mean, one_line

LARGEST_YAML = 100_000  # values in a file of options
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class ConfigError(UserError):
    """An option that does not exist, has a wrong value, or contradicts another."""


class YamlError(ValueError):
    """Text that is not YAML, or has a value that does not exist; the message is one line."""


def read_yaml(text: str | bytes) -> Any:
    """Return the value of YAML; raises YamlError, also for one that its aliases (`*name`) make too large or endless."""
    try:
        value = yaml.safe_load(text)
        if (count := _count(value, {})) > LARGEST_YAML:
            raise YamlError(f"its aliases expand to {count:.0e} values")
        return value
    # PyYAML converts values such as 2024-13-45 or `!!bool x` without a check, and nested ones by recursion.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise YamlError(one_line(error)) from error


def _count(value: Any, known: dict[int, int]) -> int:
    """Return the number of values in a value of YAML, where an alias counts like what it stands for.

    `known` are those of the containers that were counted, by `id`, 0 for those around `value`.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = 0
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    elif not known[id(value)]:
        raise YamlError("an alias stands for a value that contains it")
    return known[id(value)]


def parsed(text: str, hint: Any) -> Any:
    """Return the value of `--section.key` on a command line as YAML reads it; for text and choices, unchanged."""
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    if hint is int and text.strip().lstrip("-").isdecimal():  # YAML reads 010 as 8
        return text
    try:
        return read_yaml(text)
    except YamlError:
        return text


def checked(value: Any, hint: Any, where: str) -> Any:
    """Return a value of YAML or of a command line converted to a type, or raise a ConfigError that begins with `where`.

    `hint` is `int`, `float`, `bool`, `str`, `Literal`, a list or tuple of them, or a dataclass of them. Where a choice
    of a Literal is `no`, true is the first other one.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if "no" in arguments and value in (True, False, "true", "false"):  # YAML reads no as false
            value = "no" if value in (False, "false") else next(one for one in arguments if one != "no")
        if value not in arguments:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin in (list, tuple):
        return _checked_list(value, origin, arguments, where)
    if dataclasses.is_dataclass(hint):
        return _checked_mapping(value, hint, where)
    if isinstance(value, bool) and hint is not bool:
        quotes = ": write it in quotes" if hint is str else ""  # YAML reads No as false
        raise ConfigError(f"{where}: {value!r} is not {_KINDS[hint]}{quotes}")
    decimal = isinstance(value, str) and value.isascii() and "_" not in value  # Python accepts more
    if (hint is float and isinstance(value, int)) or (hint in (int, float) and decimal):
        with contextlib.suppress(ValueError, OverflowError):  # text: of a command line, in quotes, or 1e-4 (no dot)
            return hint(value)
    if hint is str and (value is None or isinstance(value, int | float)):
        return "" if value is None else str(value)
    if not isinstance(value, hint):
        raise ConfigError(f"{where}: {value!r} is not {_KINDS[hint]}")
    return value


def _checked_list(value: Any, origin: type, arguments: tuple[Any, ...], where: str) -> Any:
    if origin is list and arguments[0] is str and isinstance(value, str) and value and not value.startswith("["):
        value = [value]
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {value!r} is not a list such as [1, 2]")
    if origin is tuple and len(value) != len(arguments):
        raise ConfigError(f"{where}: {value!r} has {len(value)} values: give {len(arguments)}")
    return origin(checked(entry, arguments[0], where) for entry in value)


def _checked_mapping(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {value!r} is not keys and values such as {{layers: heads, epochs: 2}}")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise ConfigError(f"{where}: unknown key {key!r}: {nearest(str(key), hints)}")
    return kind(**{key: checked(entry, hints[key], f"{where}.{key}") for key, entry in value.items()})


def nearest(name: str, known: Collection[str]) -> str:
    """Return a suggestion for a name that is not known, or the known names."""
    return did_you_mean(name, sorted(known), f"known are {', '.join(sorted(known))}")
