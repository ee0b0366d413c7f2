"""Train with several settings on the same data and budget; one table and one plot of their AP.

A comparison is a YAML file:

    base: traffic-coco              # a recipe, a file in the same folder, or an absolute path or URL; or --config NAME
    settings:                       # what each run changes in it, by the name that the table shows
      last 5%: {train: {layers: last 5%}}
      all: {train: {layers: all}}

Each run has its own folder in --run.dir, and the same command again resumes the run that was interrupted. SIGTERM and
SIGINT are passed on to the current run: it saves and ends, and then the comparison does. See docs/training.md.
"""

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.commands.option_values import YamlError, read_yaml
from shards.commands.options import add_options, from_arguments, update
from shards.common.errors import UserError
from shards.common.text import one_line
from shards.storage.location import Location, check_writable
from trainer.commands import command_line as command
from trainer.commands.launcher import default_options, launch, noted_signals
from trainer.config import yaml_config
from trainer.config.command_options import CompareOptions
from trainer.config.schedule import total_steps
from trainer.config.settings import AUTO, Config, ConfigError, validate
from trainer.run.best import best_evaluation

TRAIN = Path(__file__).parents[1] / "train.py"
BRIEF = (
    *("--launch", "--config", "--data.shards", "--run.dir", "--train.epochs", "--train.steps_per_epoch"),
    "--help-all",
)


def main(arguments: Sequence[str] | None = None, program: str = "compare.py") -> int:
    """Run the command and return its exit status."""
    return command.run("compare", lambda: compare(*parse(arguments, program)))


def parse(
    arguments: Sequence[str] | None, program: str = "compare.py"
) -> tuple[dict[str, Config], Location, list[str]]:
    """Return each run's settings by name, the folder of all runs, and the arguments of `accelerate launch`."""
    description = "Train with several settings and compare their AP."
    epilog = (
        "packaged comparisons (`maskstream recipes NAME` prints one):\n"
        + yaml_config.described(yaml_config.comparisons())
        + f"\n\nexample:\n  {program} compare-layers --data.shards s3://bucket/traffic --run.dir runs/layers"
    )
    parser = command.Parser(program, description, usage=f"{program} [options] NAME_OR_FILE", brief=BRIEF, epilog=epilog)
    add_options(parser, CompareOptions)
    yaml_config.add_arguments(parser, hidden=["run.resume"])
    given = parser.parse_args(arguments)
    configs = read_comparison(given)
    if not all(config.data.shards for config in configs.values()):
        raise ConfigError("data.shards is empty: give --data.shards, such as s3://bucket/prefix")
    folder = Location(next(iter(configs.values())).run.dir)
    for name, config in configs.items():
        config.run.dir = (folder / folder_name(name)).url
    return configs, folder, shlex.split(from_arguments(CompareOptions, given).launch)


def read_comparison(options: argparse.Namespace) -> dict[str, Config]:
    """Return the settings of each run: the base, then the command line, then its own changes; ConfigError if wrong."""
    path = yaml_config.config_path(options.comparison)
    try:
        value = read_yaml(yaml_config.read_config(options.comparison, "comparison"))
    except YamlError as error:
        raise ConfigError(f"comparison {path}: cannot be read: {error}") from error
    keys = set(value) if isinstance(value, dict) else set()
    if not {"settings"} <= keys <= {"base", "settings"} or not isinstance(value["settings"], dict):
        raise ConfigError(
            f"comparison {path}: it must hold 'settings:', with the name and changes of each run, and may hold 'base:'"
        )
    base = options.config
    if base is None and "base" in value:
        base = str(value["base"])
        if base not in yaml_config.recipes() and not base.startswith("/") and "://" not in base:
            base = f"{path.rpartition('/')[0] or '.'}/{base}"
    overrides = yaml_config.overrides_of(options)
    configs: dict[str, Config] = {}
    for name, changes in value["settings"].items():
        config = yaml_config.load_config(base, overrides)
        update(config, changes, f"comparison {path}: {name}")
        validate(config)
        configs[str(name)] = config
    check_comparable(configs, path)
    return configs


def check_comparable(configs: dict[str, Config], path: str) -> None:
    """Raise `ConfigError` if the runs of a comparison cannot be compared."""
    if any(config.run.resume for config in configs.values()):
        raise ConfigError(
            "a comparison does not take run.resume (--resume): the same command resumes the run that was interrupted, "
            "and starts the others"
        )
    if any(config.data.batch_size == AUTO for config in configs.values()):
        raise ConfigError("data.batch_size is auto, which may differ between settings: give a number")
    budgets = {
        name: config.data.batch_size * config.train.accumulate * total_steps(config.train)
        for name, config in configs.items()
    }
    if len(set(budgets.values())) != 1:
        found = ", ".join(f"{name} {images}" for name, images in budgets.items()) or "there are no settings"
        raise ConfigError(f"comparison {path}: all settings must train on the same number of images per GPU: {found}")
    if len({folder_name(name) for name in configs}) < len(configs):
        raise ConfigError(f"comparison {path}: two names make the same folder: {', '.join(configs)}")


def folder_name(name: str) -> str:
    """Return a setting's name as the name of a folder: `last 5%` is `last-5`."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", name).strip("-")


def compare(configs: dict[str, Config], folder: Location, options: Sequence[str]) -> None:
    """Train with all settings, one after the other, and write the comparison."""
    command.start_logging()
    check_writable(folder, "--run.dir")
    train_all(configs, options)
    runs = {name: read_run(name, Location(config.run.dir)) for name, config in configs.items()}

    from trainer.run.plots import draw_ap_curves

    rows = [summarize(name, *run) for name, run in runs.items()]
    text = table(rows)
    (folder / "compare.md").write(text.encode("utf-8"))
    (folder / "compare.json").write(json.dumps(rows, indent=1).encode("utf-8"))
    (folder / "compare.png").write(draw_ap_curves({name: evaluations for name, (_, evaluations) in runs.items()}))
    command.say(f"\n{text}\nalso in {folder}: compare.md, compare.json, compare.png")


def train_all(configs: dict[str, Config], options: Sequence[str]) -> None:
    """Run `accelerate launch OPTIONS trainer/train.py` with each of the settings, until one fails or is stopped."""
    with noted_signals() as noted, tempfile.TemporaryDirectory(prefix="maskstream-") as temporary:
        settings = Location(f"{temporary}/settings.yaml")
        for name, config in configs.items():
            command.say(f"\n{name}: {config.run.dir}")
            yaml_config.save_config(config, settings)
            status = launch(TRAIN, ["--config", settings.path], options or default_options(), noted)
            if noted:
                raise command.Stopped(noted[0], f"stopped by a signal at {name!r}: the same command resumes from there")
            if status:
                raise UserError(
                    f"{name}: the training ended with status {status}, see its message above; to resume, run the same "
                    "command again"
                )


def read_run(name: str, run: Location) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of metrics.jsonl and evaluations.jsonl of a finished run, each at least one."""
    files = ("metrics.jsonl", "evaluations.jsonl")
    try:
        steps, evaluations = ([json.loads(line) for line in (run / file).read().splitlines()] for file in files)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {run}: {' or '.join(files)} is damaged ({one_line(error)}): train again") from error
    if not evaluations:
        raise UserError(f"{name}: {run} has no evaluation to compare: set data.val_split")
    return steps, evaluations


def summarize(name: str, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a run's row of the table; AP from 0 to 1, None where the split has nothing to find."""
    last, best = evaluations[-1], best_evaluation(evaluations)
    seconds = sum(row["seconds"] for row in steps)
    return {
        "setting": name,
        "box AP": last["bbox"]["ap"],
        "mask AP": last["segm"]["ap"],
        "mask AP50": last["segm"]["ap50"],
        "best mask AP": best["segm"]["ap"],
        "at step": best["step"],
        "images/s": sum(row["images"] for row in steps) / seconds,
        "minutes": seconds / 60,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of all runs as a table in Markdown, AP in per cent."""
    import pandas as pd

    from shards.common.tables import markdown_table

    frame = pd.DataFrame(rows)
    formats = {column: lambda ap: f"{100 * ap:.1f}" for column in frame if "AP" in column}
    return "\n".join(markdown_table(frame, formats)) + "\n"


if __name__ == "__main__":
    sys.exit(main())
