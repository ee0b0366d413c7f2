"""The command `maskstream`: one entry point for every command of the project.

`maskstream build` is `build-shards` and `maskstream inspect` is `inspect-shards`. `maskstream train`, `evaluate` and
`predict` check their arguments, then run in this process, or under `accelerate launch` where there are several GPUs or
an accelerate configuration. Only the chosen command is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from shards.common.errors import UserError
from shards.common.text import did_you_mean
from shards.common.version import __version__

# Command -> its module, and its line of help.
COMMANDS = {
    "build": ("builder.commands.cli", "select images and masks of Open Images or COCO and pack them into shards"),
    "inspect": ("shards.inspect.cli", "show what a shard dataset contains, verify it, or extract a sample"),
    "train": ("trainer.commands.train", "train Mask R-CNN on a shard dataset"),
    "evaluate": ("trainer.commands.evaluate", "score a checkpoint on a split of a shard dataset"),
    "predict": ("trainer.commands.predict", "find objects in images, folders, or a split of a shard dataset"),
    "compare": ("trainer.commands.compare", "train with several settings and compare their AP"),
}
LAUNCHED = ("train", "evaluate", "predict")  # on every GPU

_COMMAND_LINES = "\n".join(f"  {name:<10} {line}" for name, (_, line) in COMMANDS.items())
HELP = f"""\
usage: maskstream [--version] [--help] COMMAND [ARGUMENTS]

Mask R-CNN on a few classes of Open Images, streamed from tar shards in cloud storage.

commands:
{_COMMAND_LINES}

`maskstream COMMAND --help` describes a command. train, evaluate and predict use every GPU;
for several machines, or to choose GPUs, run `accelerate config` first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, 2 for a wrong argument."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        print(HELP, file=sys.stderr)
        return 2
    name, *rest = given
    if name in ("--version", "-V", "--help", "-h"):
        print(HELP if name in ("--help", "-h") else f"maskstream {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, f"the commands are {', '.join(COMMANDS)}")
        print(f"maskstream: error: unknown command {name!r}: {hint} (see --help)", file=sys.stderr)
        return 2
    module = import_module(COMMANDS[name][0])
    return _train_command(module.main, module.parse, name, rest) if name in LAUNCHED else int(module.main(rest))


def _train_command(
    run: Callable[[Sequence[str]], int], parse: Callable[[Sequence[str]], object], name: str, arguments: list[str]
) -> int:
    """Run a command of the trainer, under accelerate's launcher if there are several GPUs or a configuration."""
    if "RANK" in os.environ:  # started by a launcher already
        return run(arguments)
    try:
        parse(arguments)
    except UserError:
        return run(arguments)  # reports it
    if not _needs_launcher():
        return run(arguments)
    from trainer.commands.launcher import launch, noted_signals

    script = Path(import_module("trainer").__path__[0]) / f"{name}.py"
    with noted_signals() as noted:
        return launch(script, arguments, [], noted)


def _needs_launcher() -> bool:
    """Whether there are several GPUs, or the user has configured accelerate."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return torch.cuda.device_count() > 1 or os.path.isfile(default_config_file)
