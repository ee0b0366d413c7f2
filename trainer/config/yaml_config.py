"""From text to settings: a YAML file over the defaults, then `--section.key value` over both.

An unknown section, key or value of the wrong type is an error that names the nearest right one. Nothing here imports
torch, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any, Literal

import yaml

from shards.common.errors import StorageError
from shards.common.text import did_you_mean
from shards.storage.location import Location
from trainer.config.settings import Config, ConfigError, validate

RESUME_HELP = "go on from run.dir's newest checkpoint, or from the given one: --run.resume"


def sections() -> dict[str, type]:
    """The sections of `Config` by name."""
    hints = typing.get_type_hints(Config)
    return {item.name: hints[item.name] for item in fields(Config)}


def from_dict(value: Any, where: str) -> Config:
    """Settings from a mapping of sections; what is left out keeps its default.

    Raises:
        ConfigError: an unknown section or key, or a value of the wrong type; `where` is named.
    """
    config = Config()
    update(config, value, where)
    return config


def update(config: Config, value: Any, where: str) -> None:
    """Set what a mapping of sections says, None for nothing.

    Raises:
        ConfigError: as `from_dict`.
    """
    if value is None:
        return
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: holds {type(value).__name__}, not sections of settings such as 'data:'")
    for section, entries in value.items():
        if section not in sections():
            raise ConfigError(f"{where}: unknown section {section!r}{_nearest(str(section), sections())}")
        if not isinstance(entries, dict):
            raise ConfigError(f"{where}: section {section!r} holds {entries!r}, not keys and values")
        for key, entry in entries.items():
            set_option(config, f"{section}.{key}", entry, where)


def set_option(config: Config, name: str, value: Any, where: str) -> None:
    """Set `section.key`, checked against the field's type.

    Raises:
        ConfigError: no such option, or a value of the wrong type.
    """
    section, _, key = name.partition(".")
    known = {f"{s}.{item.name}" for s, cls in sections().items() for item in fields(cls)}
    if name not in known:
        raise ConfigError(f"{where}: unknown option {name!r}{_nearest(name, known)}")
    hint = typing.get_type_hints(sections()[section])[key]
    setattr(getattr(config, section), key, _checked(value, hint, f"{where}: {name}"))


def load_config(path: str | None, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Defaults, then the YAML file at a path or URL, then overrides `("section.key", "value as YAML")`.

    Raises:
        ConfigError: the file cannot be read, or a setting is wrong.
    """
    config = Config()
    if path is not None:
        try:
            text = Location(path).read().decode("utf-8")
            config = from_dict(yaml.safe_load(text), path)
        except (StorageError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {path}: cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"config {path}: not YAML: {' '.join(str(error).split())}") from error
    for name, text in overrides:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        set_option(config, name, value, "command line")
    validate(config)
    return config


def add_arguments(parser: argparse.ArgumentParser, hidden: Collection[str] = ()) -> None:
    """Give a command `--config` and every `--section.key`, with descriptions and defaults.

    Args:
        parser: of the command.
        hidden: options `section.key` that the help leaves out, for the command refuses them in words of its own.
    """
    parser.add_argument("--config", metavar="YAML", help="settings file, such as configs/traffic.yaml: a path or a URL")
    parser.add_argument(
        "--resume",
        dest="run.resume",
        metavar="URL",
        nargs="?",
        const="last",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS if "run.resume" in hidden else RESUME_HELP,
    )
    for section, cls in sections().items():
        group = parser.add_argument_group(section, (cls.__doc__ or "").splitlines()[0])
        for item in fields(cls):
            default = getattr(cls(), item.name)
            shown = yaml.safe_dump(default, default_flow_style=True).splitlines()[0]
            text = f"{item.metadata['help']} [{shown}]".replace("%", "%%")
            name = f"{section}.{item.name}"
            group.add_argument(
                f"--{name}",
                dest=name,
                metavar="VALUE",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS if name in hidden else text,
            )


def from_arguments(arguments: argparse.Namespace) -> Config:
    """The settings of a command that has `add_arguments`.

    Raises:
        ConfigError: as `load_config`.
    """
    overrides = [(name, value) for name, value in vars(arguments).items() if "." in name]
    return load_config(arguments.config, overrides)


def save_config(config: Config, location: Location) -> None:
    """Write the resolved settings as YAML; `load_config` reads them back."""
    location.write(yaml.safe_dump(config.to_dict(), sort_keys=False).encode("utf-8"))


def _nearest(name: str, known: Any) -> str:
    names = sorted(known)
    return ": " + did_you_mean(name, names, f"known are {', '.join(names)}")


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is list:
        if not isinstance(value, list):
            example = f"[{value}]" if arguments[0] is str and isinstance(value, str) and value else "[1, 2]"
            raise ConfigError(f"{where}: {value!r} is not a list such as {example}")
        return [_checked(entry, arguments[0], where) for entry in value]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {value!r} is not keys and values such as {{layers: heads, epochs: 2}}")
        hints = typing.get_type_hints(hint)
        for key in value:
            if key not in hints:
                raise ConfigError(f"{where}: unknown key {key!r}{_nearest(str(key), hints)}")
        return hint(**{key: _checked(entry, hints[key], f"{where}.{key}") for key, entry in value.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _checked(value, next(a for a in arguments if a is not type(None)), where)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4 (no dot) as text.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is str and value is None:
        return ""
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: {value!r} is not {'an' if hint is int else 'a'} {hint.__name__}")
    return value
