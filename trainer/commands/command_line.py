"""What the trainer's commands share: signals, exit statuses of ranks, logging. Imports no torch."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from shards.commands.command_line import Parser as Parser
from shards.commands.command_line import print_to_reader
from shards.common.errors import UserError
from trainer.commands.launcher import register_rank

MAIN_RANK_TIMEOUT_S = 10.0  # how long other ranks wait, because the first message should be the main rank's


class Stopped(Exception):
    """Raised when a signal ended the command after everything was saved.

    Args:
        number: number of the signal; the exit status is 128 + number, as in a shell.
        message: what was saved, and how to resume.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Signals:
    """Context manager that stores the first SIGTERM or SIGINT in `number` (0 before); a second one ends the process.

    Only the main thread can handle signals: in other threads, signals are left as they are.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        self.__exit__()


def run(name: str, action: Callable[[], Any]) -> int:
    """Run a command on this rank and return its exit status.

    An error of all ranks is reported by the main rank only: the launcher ends the other ranks when it exits. Another
    rank reports its error after `MAIN_RANK_TIMEOUT_S`, if it is still running.

    Args:
        name: name of the command in messages.
        action: the command.

    Returns:
        The status of `action`; 2 after a one-line error; 143 or 130 if SIGTERM or SIGINT ended it; 141 if the reader of
        its output is gone.
    """
    register_rank()
    rank = int(os.environ.get("RANK", "0"))
    try:
        return print_to_reader(lambda: int(action() or 0))
    except UserError as error:
        if rank > 0:
            time.sleep(MAIN_RANK_TIMEOUT_S)
        line = f"{name}: error{f' on rank {rank}' if rank else ''}: {error}"
        print(line, file=sys.stderr, flush=True)
        _report_to_launcher(line)
        return 2
    except Stopped as stopped:
        if rank == 0:
            print(f"{name}: {stopped}", file=sys.stderr, flush=True)
            _report_to_launcher(f"{name}: {stopped}")
        return 128 + stopped.number
    except RuntimeError as error:
        if not _lost_a_rank(error):
            raise
        print(
            f"{name}: rank {rank} ends: it lost the connection to another rank, whose own message says why",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(MAIN_RANK_TIMEOUT_S)  # the rank that failed first must end first
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return 130


def start_logging() -> None:
    """Log this project's messages at INFO on the main rank, and warnings of all packages on every rank."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for name in ("trainer", "shards"):
        logging.getLogger(name).setLevel(level)


def _lost_a_rank(error: RuntimeError) -> bool:
    """Return whether a collective failed because another of its processes exited; gloo has no error class for it."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):  # NCCL; the store
        pattern = "remote process exit|remote peer|by peer|Broken pipe|remote server shutdown"
        return bool(re.search(pattern, str(error)))
    return "/gloo/" in str(error) and bool(re.search("by peer|Broken pipe", str(error)))


def _report_to_launcher(line: str) -> None:
    """Write the error to the file that torch's launcher reads, so that its own report ends with this line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)
