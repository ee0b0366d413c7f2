"""Settings from a recipe or a YAML file, with `--section.key value` over it. Imports no torch."""

import argparse
from collections.abc import Collection, Sequence
from importlib import resources

import yaml

from shards.commands.options import add_options, set_from_words, set_from_yaml
from shards.common.errors import StorageError
from shards.common.text import did_you_mean
from shards.storage.location import Location
from trainer.config.settings import Config, ConfigError, validate

RESUME_HELP = "resume from the newest checkpoint of run.dir, or from the given checkpoint: short for --run.resume"


def load_config(name: str | None, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Return the defaults, with a recipe or YAML file and then overrides such as `("optim.lr", "0.1")` over them."""
    config = Config()
    if name is not None:
        set_from_yaml(config, read_config(name), f"config {name}")
    for option, text in overrides:
        set_from_words(config, option, text)
    validate(config)
    return config


def recipes() -> list[str]:
    """Return the names of the recipes for `--config` that are installed with the package."""
    return [name for name in _packaged() if not name.startswith("compare-")]


def comparisons() -> list[str]:
    """Return the names of the comparisons for `compare` that are installed with the package."""
    return [name for name in _packaged() if name not in recipes()]


def described(names: Sequence[str]) -> str:
    """Return a table of packaged files with the first line of each, which is a sentence about it."""
    width = max(map(len, names))
    lines = {name: (resources.files("configs") / f"{name}.yaml").read_text("utf-8").splitlines()[0] for name in names}
    return "\n".join(f"  {name:<{width}}  {line.removeprefix('# ')}" for name, line in lines.items())


def config_path(name: str) -> str:
    """Return the path of a packaged file by its name; anything else is a path or URL and is returned unchanged."""
    return str(resources.files("configs") / f"{name}.yaml") if name in _packaged() else name


def read_config(name: str, kind: str = "config") -> bytes:
    """Return a YAML file by its name in the package, path or URL; `kind` is `config` or `comparison`."""
    try:
        return Location(config_path(name)).read()
    except StorageError as error:
        problem = f"cannot be read: {error}"
        if error.missing:
            known, what = recipes(), "recipes"
            if kind == "comparison":
                known, what = comparisons(), "comparisons"
            near = did_you_mean(name.rpartition("/")[2].removesuffix(".yaml"), known)
            problem = f"not found: {near + ' The' if near else 'the'} packaged {what} are {', '.join(known)}"
        raise ConfigError(f"{kind} {name}: {problem}") from error


def _packaged() -> list[str]:
    names = (file.name for file in resources.files("configs").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def add_arguments(parser: argparse.ArgumentParser, hidden: Collection[str] = ()) -> None:
    """Add `--config`, `--resume` and every `--section.key` to a parser; its help omits the `hidden` ones."""
    parser.add_argument("--config", metavar="NAME", help="settings: a recipe, or the path or URL of a YAML file")
    parser.add_argument(
        "--resume",
        dest="run.resume",
        metavar="URL",
        nargs="?",
        const="last",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS if "run.resume" in hidden else RESUME_HELP,
    )
    add_options(parser, Config, hidden)


def overrides_of(given: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the options `section.key` of a parsed command line, for `load_config`."""
    return [(name, text) for name, text in vars(given).items() if "." in name]


def from_arguments(given: argparse.Namespace) -> Config:
    """Return the settings of a command that has `add_arguments`; errors as in `load_config`."""
    return load_config(given.config, overrides_of(given))


def save_config(config: Config, location: Location) -> None:
    """Write the resolved settings as YAML, which `load_config` reads back."""
    location.write(yaml.safe_dump(config.to_dict(), sort_keys=False).encode("utf-8"))
