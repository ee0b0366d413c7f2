"""List the recipes and comparisons of the package, or print one: `maskstream recipes traffic > my.yaml`."""

from collections.abc import Sequence

from shards.commands.command_line import Parser, run, say
from shards.common.errors import UserError
from shards.common.text import did_you_mean
from trainer.config.yaml_config import comparisons, described, read_config, recipes


def main(arguments: Sequence[str] | None, program: str) -> int:
    """Run the command and return its exit status."""

    def action() -> int:
        parser = Parser(program, __doc__.partition(":")[0] + ".", usage=f"{program} [options] [NAME]")
        parser.add_argument("name", metavar="NAME", nargs="?", help="the one to print; none to list all")
        say(_text(parser.parse_args(arguments).name))
        return 0

    return run("recipes", action)


def _text(name: str | None) -> str:
    if name is None:
        return (
            f"recipes, for `maskstream train --config NAME`:\n{described(recipes())}\n\n"
            f"comparisons, for `maskstream compare NAME`:\n{described(comparisons())}"
        )
    known = [*recipes(), *comparisons()]
    if name not in known:
        raise UserError(f"there is no recipe {name!r}: {did_you_mean(name, known, 'run `maskstream recipes` for all')}")
    return read_config(name).decode("utf-8").rstrip("\n")
