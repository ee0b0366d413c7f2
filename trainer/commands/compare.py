"""Train with several settings on the same data and budget; one table and one plot of their AP.

    python trainer/compare.py configs/compare-layers.yaml --data.shards s3://bucket/prefix --run.dir runs/layers \
        --launch "--multi_gpu --num_processes 8"

A comparison is a YAML file:

    base: traffic-coco.yaml         # a recipe beside this file, or a whole path or URL; --config names another
    settings:                       # what each run changes in it, by the name that the table shows
      last 5%: {train: {layers: last 5%}}
      all: {train: {layers: all}}

`--section.key value` changes all runs. Each has a folder of its own in --run.dir, and the same command again goes on
with the run that was interrupted. SIGTERM and SIGINT are passed on to the run under way: it saves and ends, then the
comparison does. At the end --run.dir holds compare.md, compare.json and compare.png.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shards.common.errors import StorageError, UserError
from shards.common.options import update
from shards.storage.location import Location, check_writable
from trainer.commands import command_line as command
from trainer.commands.launcher import launch, noted_signals
from trainer.config.schedule import total_steps
from trainer.config.settings import Config, ConfigError, validate
from trainer.config.yaml_config import add_arguments, config_path, load_config, overrides_of, save_config

TRAIN = Path(__file__).parents[1] / "train.py"
FILES = ("metrics.jsonl", "evaluations.jsonl")
COLUMNS = ("setting", "box AP", "mask AP", "mask AP50", "best mask AP", "at step", "images/s", "minutes")


@dataclass(frozen=True)
class Result:
    """What became of one setting.

    Attributes:
        name: as in the comparison.
        evaluations: the rows of its evaluations.jsonl, at least one.
        images_per_s: images over the seconds of all steps.
        minutes: of all steps together.
    """

    name: str
    evaluations: list[dict[str, Any]]
    images_per_s: float
    minutes: float

    def row(self) -> dict[str, Any]:
        """The values of COLUMNS; AP from 0 to 1."""
        last = self.evaluations[-1]
        best = max(self.evaluations, key=lambda row: row["segm"]["ap"] or 0.0)
        values = (
            self.name,
            last["bbox"]["ap"],
            last["segm"]["ap"],
            last["segm"]["ap50"],
            best["segm"]["ap"],
            best["step"],
            self.images_per_s,
            self.minutes,
        )
        return dict(zip(COLUMNS, values, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return command.run("compare", lambda: compare(*parse(arguments)))


def parse(arguments: Sequence[str] | None) -> tuple[dict[str, Config], Location, list[str]]:
    """The settings of each run by name, the folder of all, and the arguments of `accelerate launch`.

    Raises:
        UserError: a wrong argument or comparison.
    """
    parser = command.Parser(prog="compare.py", description="Train with several settings and compare their AP.")
    parser.add_argument(
        "comparison",
        metavar="NAME",
        help="comparison: a name such as compare-layers, or the path or URL of a YAML file",
    )
    parser.add_argument("--launch", default="", metavar="TEXT", help="arguments of accelerate launch, as one text")
    add_arguments(parser, hidden=["run.resume"])
    options = parser.parse_args(arguments)
    configs = read_comparison(options)
    if not all(config.data.shards for config in configs.values()):
        raise ConfigError("data.shards is empty: give --data.shards, such as s3://bucket/prefix")
    folder = Location(next(iter(configs.values())).run.dir)
    for name, config in configs.items():
        config.run.dir = (folder / folder_name(name)).url
    return configs, folder, shlex.split(options.launch)


def read_comparison(options: argparse.Namespace) -> dict[str, Config]:
    """The settings of each run: the base, then the command line, then what is its own.

    Raises:
        ConfigError: the file is wrong, the runs would not see equally many images, or one was to be resumed.
    """
    path = config_path(options.comparison)
    try:
        value = yaml.safe_load(Location(path).read())
    except (StorageError, yaml.YAMLError) as error:
        raise ConfigError(f"comparison {path}: cannot be read: {' '.join(str(error).split())}") from error
    if (
        not isinstance(value, dict)
        or not set(value) <= {"base", "settings"}
        or not isinstance(value.get("settings"), dict)
    ):
        raise ConfigError(
            f"comparison {path}: it must hold 'settings:', a name and its changes each, and may hold 'base:'"
        )
    base = options.config
    if base is None and "base" in value:
        base = str(value["base"])
        if not base.startswith("/") and "://" not in base:
            base = f"{path.rpartition('/')[0] or '.'}/{base}"
    overrides = overrides_of(options)
    configs: dict[str, Config] = {}
    for name, changes in value["settings"].items():
        config = load_config(base, overrides)
        update(config, changes, f"comparison {path}: {name}")
        validate(config)
        configs[str(name)] = config
    if any(config.run.resume for config in configs.values()):
        raise ConfigError(
            "run.resume (--resume) has no place in a comparison: the same command goes on with the run that was "
            "interrupted, and begins the others"
        )
    budgets = {name: images_of(config) for name, config in configs.items()}
    if len(set(budgets.values())) != 1:
        told = ", ".join(f"{name} {images}" for name, images in budgets.items()) or "there is none"
        raise ConfigError(f"comparison {path}: all settings must train on as many images a GPU: {told}")
    if len({folder_name(name) for name in configs}) < len(configs):
        raise ConfigError(f"comparison {path}: two names make the same folder: {', '.join(configs)}")
    return configs


def images_of(config: Config) -> int:
    """How many images a run takes on each GPU."""
    return config.data.batch_size * config.train.accumulate * total_steps(config.train)


def folder_name(name: str) -> str:
    """A setting's name as a folder's: `last 5%` is `last-5`."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", name).strip("-")


def compare(configs: dict[str, Config], folder: Location, options: Sequence[str]) -> int:
    """Train them all, one after the other, and write what came of it.

    Raises:
        UserError: `folder` cannot be written, or a training failed.
        command.Stopped: as `train_all`.
    """
    command.start_logging()
    check_writable(folder, "--run.dir")
    train_all(configs, options)
    results = [read_result(name, Location(config.run.dir)) for name, config in configs.items()]

    from trainer.run.plots import draw_comparison

    text = table(results)
    (folder / "compare.md").write(text.encode("utf-8"))
    (folder / "compare.json").write(json.dumps([result.row() for result in results], indent=1).encode("utf-8"))
    (folder / "compare.png").write(draw_comparison({result.name: result.evaluations for result in results}))
    print(f"\n{text}\nalso in {folder}: compare.md, compare.json, compare.png")
    return 0


def train_all(configs: dict[str, Config], options: Sequence[str]) -> None:
    """`accelerate launch trainer/train.py` with each of these settings.

    Args:
        configs: by name, each with a `run.dir` of its own.
        options: of `accelerate launch`.

    Raises:
        UserError: a training failed.
        command.Stopped: a signal ended the training under way.
    """
    with noted_signals() as noted, tempfile.TemporaryDirectory(prefix="maskstream-") as temporary:
        settings = Location(f"{temporary}/settings.yaml")
        for name, config in configs.items():
            print(f"\n{name}: {config.run.dir}", flush=True)
            save_config(config, settings)
            status = launch(TRAIN, ["--config", settings.path], options, noted)
            if noted:
                raise command.Stopped(noted[0], f"stopped by a signal at {name!r}: the same command goes on from there")
            if status:
                raise UserError(
                    f"{name}: the training ended with status {status}, its message is above; the same command goes on"
                )


def read_result(name: str, run: Location) -> Result:
    """What a finished run has written.

    Raises:
        UserError: it was never evaluated.
    """
    steps, evaluations = ([json.loads(line) for line in (run / file).read().splitlines()] for file in FILES)
    if not evaluations:
        raise UserError(f"{name}: {run} has no evaluation to compare: set data.val_split")
    seconds = sum(row["seconds"] for row in steps)
    return Result(name, evaluations, sum(row["images"] for row in steps) / seconds, seconds / 60)


def table(results: Sequence[Result]) -> str:
    """All results in Markdown, AP in per cent."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for result in results:
        cells = [_cell(column, value) for column, value in result.row().items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if "AP" in column:
        return f"{100 * value:.1f}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
