"""What all commands share: the parser with its one-line errors, `--version` and completion, and exit statuses."""

import argparse
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from shards.common.argument_checks import is_text
from shards.common.errors import UserError
from shards.common.redact import RedactingFormatter, redact
from shards.common.text import did_you_mean, one_line, printable
from shards.common.version import __version__

UNREAD = 141  # a shell's exit status for a process that SIGPIPE (13) ended


class Parser(argparse.ArgumentParser):
    """Parser of a command: a wrong argument is a `UserError` of one line that suggests the nearest name.

    Options cannot be abbreviated, because a script must not change its meaning when an option is added. Completion in
    a shell needs the package `argcomplete`: eval "$(register-python-argcomplete build-shards)".
    """

    def __init__(self, prog: str, description: str, *, brief: Sequence[str] = (), **arguments: Any) -> None:
        """`brief` names the options that `--help` describes, if there are too many; `--help-all` describes all."""
        super().__init__(
            prog,
            description=description,
            usage=arguments.pop("usage", f"{prog} [options]"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **arguments,
        )
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        self._brief = brief
        if brief:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="describe all options, and exit")

    def format_help(self) -> str:
        """Return the text of `--help`."""
        if not self._brief:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, (), ())
        formatter.add_text(self.description)
        formatter.start_section("options that most runs need")
        formatter.add_arguments([self._option_string_actions[name] for name in self._brief])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; raises UserError for a wrong one."""
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete  # type: ignore[import-not-found]

            argcomplete.autocomplete(self)
        for word in sys.argv[1:] if args is None else args:
            if not is_text(word):  # a path that cannot be a URL, a key of a store, or text in a file
                self.error(f"argument {word!r} is not UTF-8: rename the file or folder")
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False  # checked below: a misspelt option is unknown, not missing
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = did_you_mean(name, self._option_string_actions, limit=1) if name.startswith("-") else ""
            self.error(f"unknown argument {name}" + (f": {near}" if near else ""))
        missing = [action for action in required if not hasattr(parsed, action.dest)]
        if missing:
            names = ("/".join(action.option_strings) or action.metavar or action.dest for action in missing)
            self.error(f"the following arguments are required: {', '.join(map(str, names))}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` with the message."""
        raise UserError(f"{message} (see --help)")


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(argparse.ArgumentParser.format_help(parser), end="")
        parser.exit()


def run(
    name: str, action: Callable[[], int], *, show: Callable[[str], str] = one_line, interrupted: str = "interrupted"
) -> int:
    """Run a command and return its exit status: its own, 2 for a `UserError`, 130 for Ctrl-C, 141 for a closed stdout.

    Messages begin with `name`; `show` makes the text of an error printable, and credentials are removed from it;
    `interrupted` is the message after Ctrl-C.
    """

    def guarded() -> int:
        try:
            return action()
        except UserError as error:
            say(f"{name}: error: {printable(redact(show(str(error))))}", sys.stderr)
            return 2
        except KeyboardInterrupt:
            say(f"{name}: {interrupted}", sys.stderr)
            return 130

    return print_to_reader(guarded)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print text to a stream, stdout by default, at once, above bars of `progress`, without the credentials of URLs."""
    from shards.commands.progress import above_bars  # not at the top: --help answers without tqdm

    stream = stream or sys.stdout
    with above_bars(stream):
        print(redact(text), file=stream, flush=True)


def print_to_reader(command: Callable[[], int]) -> int:
    r"""Run a command and return its exit status; `UNREAD`, without a message, if the reader of its output is gone.

    Characters that the output's encoding does not have are written as `\u00e4`, as Python does on stderr.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # prints warnings of commands without a log
        logging.lastResort.setFormatter(RedactingFormatter("%(message)s"))
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # another pipe or connection
        # Otherwise the rest of the buffer would fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD


def _reader_is_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no `poll` on this system, or stdout is not a file
        return False
