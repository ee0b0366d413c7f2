"""What a command prints, where nobody reads it to its end: `inspect-shards ... | head`."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

UNREAD = 141  # the exit status of a process that SIGPIPE (13) ended, as a shell has it


def print_to_reader(command: Callable[[], int]) -> int:
    """Run a command and return its exit status; `UNREAD`, without a word, when its reader has gone."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # of another pipe or connection
        # What is left in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD


def _reader_is_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no `poll` on this system, or no file behind stdout
        return False
