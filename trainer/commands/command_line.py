"""What the commands share: arguments, errors as one line, logging. Imports no torch."""

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
from shards.commands.output import print_to_reader
from shards.common.errors import UserError
from trainer.commands.launcher import register_rank

TIMEOUT_S = 10.0


class Stopped(Exception):
    """A signal ended the command, and everything is saved.

    Args:
        number: of the signal; the exit status is 128 more, as a shell has it.
        message: what is saved, and how to go on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Signals:
    """Within it, SIGTERM and SIGINT are noted in `number` (0 before) and end nothing; a second one does.

    Only the main thread can take signals; in another they keep their meaning.
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
    """Run a command: 0, or 2 after one line on stderr; 143 or 130 when SIGTERM or SIGINT ended it, 141 where its output
    is not read to its end.

    What fails on every rank is told by the main one, and the launcher ends the others when it has gone. A rank that
    alone is in trouble is not ended, and speaks up after `TIMEOUT_S`.
    """
    register_rank()
    rank = int(os.environ.get("RANK", "0"))
    try:
        return print_to_reader(lambda: int(action() or 0))
    except UserError as error:
        if rank > 0:
            time.sleep(TIMEOUT_S)
        line = f"{name}: error{f' on rank {rank}' if rank else ''}: {error}"
        print(line, file=sys.stderr, flush=True)
        _tell_launcher(line)
        return 2
    except Stopped as stopped:
        if rank == 0:
            print(f"{name}: {stopped}", file=sys.stderr, flush=True)
            _tell_launcher(f"{name}: {stopped}")
        return 128 + stopped.number
    except RuntimeError as error:
        if not _lost_a_rank(error):
            raise
        print(
            f"{name}: rank {rank} ends: it lost the connection to another rank, whose own message says why",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(TIMEOUT_S)  # the launcher is to see first who began
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return 130


def start_logging() -> None:
    """Our own messages from INFO on the main rank, warnings of everyone's on all."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for name in ("trainer", "shards"):
        logging.getLogger(name).setLevel(level)


def _lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another process of it has gone; gloo has no error of its own."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):  # of NCCL; of the store that all share
        told = "remote process exit|remote peer|by peer|Broken pipe|remote server shutdown"
        return bool(re.search(told, str(error)))
    return "/gloo/" in str(error) and bool(re.search("by peer|Broken pipe", str(error)))


def _tell_launcher(line: str) -> None:
    """Leave the error where torch's launcher looks for it: it then ends its own long report with this line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)
