"""The command `maskstream`: one entry point for every command of the project.

`maskstream build` is `build-shards`, `maskstream classes` its `--list-classes`, and `maskstream inspect` is
`inspect-shards`. `maskstream train`, `evaluate`, `predict` and `fill` check their arguments, then run in this process,
or under `accelerate launch` where there are several GPUs or an accelerate configuration (`predict` for a dataset only,
not for images). `maskstream export` writes datasets, which is done by `shards`, or with `--to onnx` a model, by
`trainer`. Only the chosen command is imported.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from shards.common.errors import UserError
from shards.common.text import did_you_mean
from shards.common.version import __version__

# Command -> its module, and its line of help.
COMMANDS = {
    "build": ("builder.commands.cli", "select images and masks of Open Images or COCO and pack them into shards"),
    "classes": ("builder.commands.cli", "list the classes of Open Images or COCO files, with images, masks and boxes"),
    "inspect": ("shards.inspect.cli", "show what a shard dataset contains, verify it, or extract a sample"),
    "export": ("shards.export.cli", "write a dataset for other trainers (COCO, Ultralytics, ...), or a model as ONNX"),
    "train": ("trainer.commands.train", "train Mask R-CNN on a shard dataset"),
    "evaluate": ("trainer.commands.evaluate", "score a checkpoint on a split of a shard dataset"),
    "predict": ("trainer.commands.predict", "find objects in images, folders, or a split of a shard dataset"),
    "fill": ("trainer.commands.fill", "predict masks for the objects of a shard dataset that have a box only"),
    "compare": ("trainer.commands.compare", "train with several settings and compare their AP"),
    "recipes": ("trainer.commands.recipes", "list the settings that come with the package, or print one"),
}
ONNX_EXPORT = "trainer.commands.export_onnx"  # the module of `export --to onnx`
LAUNCHED = ("train", "evaluate", "predict", "fill")  # on every GPU

_COMMAND_LINES = "\n".join(f"  {name:<10} {line}" for name, (_, line) in COMMANDS.items())
HELP = f"""\
usage: maskstream [-h | --help] [-V | --version] COMMAND [ARGUMENTS]

Mask R-CNN on a few classes of Open Images, streamed from tar shards in cloud storage.

commands:
{_COMMAND_LINES}

`maskstream COMMAND --help` describes a command. train, evaluate, predict and fill use every GPU;
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
    module = ONNX_EXPORT if name == "export" and _is_model(rest) else COMMANDS[name][0]
    try:
        return _run(name, module, rest)
    except ModuleNotFoundError as error:
        if not module.startswith("trainer."):
            raise
        package = str(error.name).partition(".")[0]
        print(f"maskstream {name}: error: {package} is not installed: pip install '.[train]'", file=sys.stderr)
        return 2


def _is_model(arguments: Sequence[str]) -> bool:
    """Return whether arguments of `export` ask for a model, not for a dataset."""
    return "--to=onnx" in arguments or ("--to", "onnx") in pairwise(arguments)


def _run(name: str, module_name: str, rest: Sequence[str]) -> int:
    module, program = import_module(module_name), f"maskstream {name}"
    if name in ("build", "inspect"):
        return int(module.main(rest))
    if name == "classes":
        return int(module.main(["--list-classes", *rest]))
    if name not in LAUNCHED or not _needs_launcher(name, module.parse, rest, program):
        return int(module.main(rest, program))
    from trainer.commands.launcher import default_options, launch, noted_signals

    script = Path(import_module("trainer").__path__[0]) / f"{name}.py"
    with noted_signals() as noted:
        return launch(script, rest, default_options(), noted)


def _needs_launcher(
    name: str, parse: Callable[[Sequence[str], str], Any], arguments: Sequence[str], program: str
) -> bool:
    """Return whether to run a command of the trainer on several GPUs, or as the user has configured accelerate."""
    if "RANK" in os.environ:  # started by a launcher already
        return False
    try:
        options = parse(arguments, program)
    except UserError:
        return False  # the command reports it
    if name == "predict" and not options.shards:  # images need a single process
        return False
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return torch.cuda.device_count() > 1 or os.path.isfile(default_config_file)
