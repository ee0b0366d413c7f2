"""Options of the commands, declared as dataclass fields: flags, YAML keys, types, ranges and help together.

A dataclass of options is flat: the field `per_class` is the flag `--per-class` and the YAML key `per-class`. A
dataclass of dataclasses has sections: the field `batch_size` of the field `data` is `--data.batch_size`, in YAML
`data: {batch_size: 8}`, and its value on the command line is YAML. `jsonargparse` (4.53) has neither `--per-class` nor
`--classes Person Car` nor `--dry-run` without a value, and accepts abbreviations and unknown sections.
"""

import argparse
import dataclasses
import functools
import math
import shlex
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

import yaml

from shards.commands.option_values import ConfigError as ConfigError
from shards.commands.option_values import YamlError, checked, nearest, parsed, read_yaml

T = TypeVar("T")


def option(
    default: Any,  # value without the option, or a function that returns it
    help: str,  # one line of description; range and default are appended to it
    *,
    low: float | None = None,  # smallest value; of a list, of each of its values
    high: float | None = None,
    flag: str = "",  # without `--`, if it does not follow from the field's name
    group: str = "",  # title of its group in the help, for a flat dataclass
    exclusive: str = "",  # name of a set of options of which at most one may be given
    metavar: str | tuple[str, ...] | None = None,
    commas: bool = False,  # a list is given as one argument with commas
    positional: bool = False,  # an argument without a flag
    required: bool = False,
    named: Mapping[str, Any] = types.MappingProxyType({}),  # words for some of its values
    default_help: str = "",  # what the help shows as the default, if not `default`
) -> Any:
    """Return a dataclass field that is an option."""
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Entry:
    """One option: its field and its type."""

    section: str  # field that holds the option's dataclass; "" in a flat dataclass
    item: dataclasses.Field[Any]
    hint: Any  # type of the value, without `| None`
    optional: bool  # whether the type has `| None`

    @property
    def name(self) -> str:
        """The flag without `--`, and the key of a YAML file: `per-class`, `data.batch_size`."""
        if self.section:
            return f"{self.section}.{self.item.name}"
        return self.item.metadata["flag"] or self.item.name.replace("_", "-")

    @property
    def default(self) -> Any:
        """The value without the option."""
        make = self.item.default_factory
        return self.item.default if make is dataclasses.MISSING else make()

    def value(self, options: Any) -> Any:
        """Return the value."""
        return getattr(self._owner(options), self.item.name)

    def set(self, options: Any, value: Any) -> None:
        """Replace the value."""
        setattr(self._owner(options), self.item.name, value)

    def checked(self, value: Any, where: str) -> Any:
        """Return a value, or one of the option's words, converted to its type; a ConfigError begins with `where`."""
        named = self.item.metadata["named"]
        return named[value] if isinstance(value, str) and value in named else checked(value, self.hint, where)

    def _owner(self, options: Any) -> Any:
        return getattr(options, self.section) if self.section else options


def _find_entries(kind: type) -> dict[str, Entry]:
    found = [
        Entry(section, item, *_optional(hint))
        for section, holder in (sections(kind) or {"": kind}).items()
        for item, hint in zip(fields(holder), typing.get_type_hints(holder).values(), strict=True)
    ]
    return {entry.name: entry for entry in found}


entries: Callable[[Any], dict[str, Entry]] = functools.cache(_find_entries)


def sections(kind: type) -> dict[str, type]:
    """Return the dataclasses of a dataclass's sections by name."""
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind) if dataclasses.is_dataclass(hints[item.name])}


def add_options(parser: argparse.ArgumentParser, kind: type, hidden: Collection[str] = ()) -> None:
    """Add the options of a dataclass to a parser; the help omits those whose names are `hidden`."""
    groups: dict[str, Any] = {"": parser}
    for name, cls in sections(kind).items():
        groups[name] = parser.add_argument_group(name, (cls.__doc__ or "").splitlines()[0])
    for entry in entries(kind).values():
        title = entry.section or entry.item.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        words = _words(entry)
        if entry.name in hidden:
            words["help"] = argparse.SUPPRESS
        if not entry.item.metadata["positional"]:
            words |= {"dest": entry.name, "required": entry.item.metadata["required"]}
        flag = entry.name if entry.item.metadata["positional"] else f"--{entry.name}"
        groups[title].add_argument(flag, default=argparse.SUPPRESS, **words)


def from_arguments(kind: type[T], given: argparse.Namespace) -> T:
    """Return the options of a parsed command line; raises ConfigError as `set_from_arguments` and `check` do."""
    options = kind()
    set_from_arguments(options, given)
    check(options)
    return options


def set_from_arguments(options: Any, given: argparse.Namespace) -> None:
    """Set the options that a command line gives; raises ConfigError for a value of a wrong type."""
    for name in entries(type(options)):
        if hasattr(given, name):
            set_from_words(options, name, getattr(given, name))


def set_from_words(options: Any, name: str, words: str | bool | Sequence[str]) -> None:
    """Set one option from its argument or arguments on a command line; of a flag, from whether it is set."""
    entry = _entry(options, name, "command line")
    value: Any = words if isinstance(words, str | bool) else list(words)
    if isinstance(words, str) and entry.item.metadata["commas"]:
        value = _split(words)
    elif isinstance(words, str) and entry.section:
        value = parsed(words, entry.hint)
    entry.set(options, entry.checked(value, f"--{name}"))


def set_from_yaml(options: Any, data: bytes, where: str) -> None:
    """Set the options in the content of a YAML file; `where` names the file in a ConfigError about it."""
    try:
        value = read_yaml(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from error
    except YamlError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error
    update(options, value, where)


def update(options: Any, value: Any, where: str) -> None:
    """Set the options that a mapping from YAML holds, if any; raises ConfigError for an unknown one or a wrong type."""
    if value is None:
        return
    parts = sections(type(options))
    if not isinstance(value, dict):
        example = f"sections of settings such as '{next(iter(parts))}:'" if parts else "a mapping of options to values"
        raise ConfigError(f"{where}: holds {type(value).__name__}, not {example}")
    for key, entry in value.items():
        if not parts:
            _set_option(options, str(key).replace("_", "-"), entry, where)
        elif key not in parts:
            raise ConfigError(f"{where}: unknown section {key!r}: {nearest(str(key), parts)}")
        elif not isinstance(entry, dict):
            raise ConfigError(f"{where}: section {key!r} holds {entry!r}, not keys and values")
        else:
            for inner, one in entry.items():
                _set_option(options, f"{key}.{inner}", one, where)


def _set_option(options: Any, name: str, value: Any, where: str) -> None:
    entry = _entry(options, name, where)
    if not entry.section:
        if value is None:
            raise ConfigError(f"{where}: {name} has no value: give one, or omit the line")
        if entry.item.metadata["commas"] and isinstance(value, str):
            value = _split(value)
        elif typing.get_origin(entry.hint) is list and not isinstance(value, list):
            value = [value]
    entry.set(options, entry.checked(value, f"{where}: {name}"))


def check(options: Any) -> None:
    """Raise ConfigError for a value out of its range, or two options that cannot be combined."""
    given: dict[str, str] = {}
    for name, entry in entries(type(options)).items():
        value = entry.value(options)
        shown = name if entry.section else f"--{name}"
        check_range(shown, value, entry.item)
        exclusive = entry.item.metadata["exclusive"]
        if exclusive and value != entry.default:
            if exclusive in given:
                raise ConfigError(f"{given[exclusive]} and {shown} cannot be combined: leave one out")
            given[exclusive] = shown


def check_range(name: str, value: Any, item: dataclasses.Field[Any]) -> None:
    """Check the range of a value, or of each value of a list; raises ConfigError, also for one that is not finite."""
    low, high = item.metadata["low"], item.metadata["high"]
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, float) and not math.isfinite(one):
            bounds = "" if low is None and high is None else f", {_bounds(low, high)}"
            raise ConfigError(f"{name} is {value}: give a finite number{bounds}")
        if isinstance(one, int | float) and ((low is not None and one < low) or (high is not None and one > high)):
            raise ConfigError(f"{name} is {value}: it must be {_bounds(low, high)}")


def to_words(options: Any, names: Collection[str], always: Collection[str] = ()) -> list[str]:
    """Return the arguments that set options of a flat dataclass: of `names`, if not the default, and of `always`."""
    words: list[str] = []
    for name, entry in entries(type(options)).items():
        value = entry.value(options)
        if name not in always and (name not in names or value == entry.default):
            continue
        words.append(f"--{name}")
        if entry.item.metadata["commas"]:
            words.append(",".join(value))
        elif isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def _entry(options: Any, name: str, where: str) -> Entry:
    known = entries(type(options))
    if name not in known:
        raise ConfigError(f"{where}: unknown option {name!r}: {nearest(name, known)}")
    return known[name]


def _bounds(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"


def _optional(hint: Any) -> tuple[Any, bool]:
    """Return a type without `| None`, and whether it had it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None)), True
    return hint, False


def _words(entry: Entry) -> dict[str, Any]:
    """Return the arguments of `add_argument` that follow from an option's type."""
    metadata, hint, origin = entry.item.metadata, entry.hint, typing.get_origin(entry.hint)
    words: dict[str, Any] = {"help": _help(entry)}
    if hint is bool and not entry.section:
        return words | {"action": argparse.BooleanOptionalAction if entry.optional else "store_true"}
    words["metavar"] = metadata["metavar"] or ("N" if hint is int else "X" if hint is float else "VALUE")
    if origin is Literal:
        words |= {"choices": typing.get_args(hint), "metavar": None}
    if origin is tuple and not entry.section:
        words["nargs"] = len(typing.get_args(hint))
    elif origin is list and not entry.section and not metadata["commas"]:
        words["nargs"] = "*" if metadata["positional"] else "+"
    return words


def _help(entry: Entry) -> str:
    """Return an option's description with its range and default, as argparse formats it."""
    low, high = entry.item.metadata["low"], entry.item.metadata["high"]
    notes = [_bounds(low, high)] if low is not None or high is not None else []
    default = entry.default
    if entry.item.metadata["default_help"]:
        notes.append(f"default: {entry.item.metadata['default_help']}")
    elif default in ("", None) or (default is False and not entry.section):
        pass  # the description says what no value means
    elif entry.section:
        as_text = (
            default if isinstance(default, str) else yaml.safe_dump(default, default_flow_style=True).splitlines()[0]
        )
        notes.append(f"default: {as_text}")
    elif default != []:
        notes.append("default: " + (shlex.join(map(str, default)) if isinstance(default, list) else str(default)))
    text: str = entry.item.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
