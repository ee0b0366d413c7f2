"""`--config FILE`: a YAML file with the names of the flags. Flags given beside it win."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from shards.common.errors import UserError
from shards.common.text import did_you_mean

NOT_IN_A_FILE = ("help", "config")


def with_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The command line with the options of its `--config FILE`, if it names one, put before its own.

    Raises:
        UserError: the file cannot be read, is not a mapping, or holds a name or a value that is no option's.
    """
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--config")
    file = only.parse_known_args(list(argv))[0].config
    return [*config_words(parser, file), *argv] if file else list(argv)


def config_words(parser: argparse.ArgumentParser, file: str) -> list[str]:
    """The options in a file as words of a command line; for errors see `with_config`."""
    import yaml

    try:
        with open(file, encoding="utf-8") as stream:
            found = yaml.safe_load(stream)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: cannot be read ({error}): give the path of a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {file}: not YAML ({' '.join(str(error).split())})") from error
    if found is None:
        return []
    if not isinstance(found, dict):
        raise UserError(f"--config {file}: not a mapping of options to values, such as `per-class: 1000`")
    # argparse keeps its actions in a private list, and offers no other way to enumerate them.
    actions = {name: action for action in parser._actions for name in action.option_strings if name.startswith("--")}
    known = {name[2:]: action for name, action in actions.items() if name[2:] not in NOT_IN_A_FILE}
    words: list[str] = []
    for key, value in found.items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise UserError(f"--config {file}: there is no option {key!r}: {did_you_mean(name, known, 'see --help')}")
        words += _words(name, value, known[name], file)
    return words


def _words(name: str, value: Any, action: argparse.Action, file: str) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"--config {file}: {name} is {value!r}: give true or false")
        return [f"--{name}"] if value else []
    several = action.nargs is not None
    values = value if several and isinstance(value, list) else [value]
    for entry in values:
        # YAML reads Yes and No as booleans, and an empty value as null.
        if isinstance(entry, dict | list | bool) or entry is None:
            wanted = "values, each in quotes where YAML would read it otherwise" if several else "one value"
            raise UserError(f"--config {file}: {name} is {value!r}: give {wanted}")
    if several:
        return [f"--{name}", *map(str, values)]
    return [f"--{name}={values[0]}"]
