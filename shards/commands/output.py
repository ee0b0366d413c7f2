"""Commands whose output is not read to its end, as in `inspect-shards ... | head`."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

UNREAD = 141  # a shell's exit status for a process that SIGPIPE (13) ended


def print_to_reader(command: Callable[[], int]) -> int:
    """Run a command and return its exit status; `UNREAD`, without a message, if the reader of its output is gone."""
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
