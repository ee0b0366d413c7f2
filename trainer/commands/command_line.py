"""What the trainer's commands share: signals, exit statuses of ranks, logging. Imports no torch."""

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from shards.commands.command_line import Parser as Parser
from shards.commands.command_line import print_to_reader
from shards.commands.command_line import say as say
from shards.common.errors import UserError
from shards.common.redact import RedactingFormatter, redact
from shards.common.text import one_line, printable
from trainer.commands.launcher import is_ending, leave_status, register_rank

# What helps if a GPU's memory is full.
LESS_MEMORY = "lower --batch-size"
LESS_MEMORY_IN_TRAINING = (
    "lower --data.batch_size and raise --train.accumulate by the same factor, set --train.precision bf16 with "
    "--train.frozen_norms autocast, or --train.checkpoint_activations true, or lower --data.max_size"
)
MAIN_RANK_TIMEOUT_S = 10.0  # how long other ranks wait, because the first message should be the main rank's


class Stopped(Exception):
    """A signal of this number ended the command after everything was saved; the message says how to resume."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Signals:
    """Context manager that stores the first SIGTERM or SIGINT in `number` (0 before); a second one ends the process.

    Does nothing outside the main thread, the only one that can handle signals.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        is_ending.set()
        self.__exit__()


def run(name: str, action: Callable[[], Any]) -> int:
    """Run a command on this rank and return its exit status; `name` is the command's in messages.

    An error of all ranks is reported by the main rank only: the launcher ends the other ranks when it exits. Another
    rank reports its error after `MAIN_RANK_TIMEOUT_S`, if it is still running.

    The status is that of `action` (None is 0); 2 after a one-line error; 143 or 130 if SIGTERM or SIGINT ended it; 141
    if the reader of its output is gone.
    """
    register_rank()
    status = _run(name, action)
    leave_status(status)
    return status


def _run(name: str, action: Callable[[], Any]) -> int:
    rank = int(os.environ.get("RANK", "0"))
    try:
        return print_to_reader(lambda: int(action() or 0))
    except UserError as error:
        if rank > 0:
            time.sleep(MAIN_RANK_TIMEOUT_S)
        _report(f"{name}: error{f' on rank {rank}' if rank else ''}: {printable(one_line(str(error)))}")
        return 2
    except Stopped as stopped:
        if rank == 0:
            _report(f"{name}: {stopped}")
        return 128 + stopped.number
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported here
            size = re.search(r"GPU \d+ has a total capacity of [\d.]+ \w+", str(error))
            what = f"out of memory{f': {size[0]}' if size else ''}"
            _report(f"{name}: error: {what}: {LESS_MEMORY_IN_TRAINING if name == 'train' else LESS_MEMORY}")
            return 2
        if not _lost_a_rank(error):
            raise
        line = f"{name}: rank {rank} ends: it lost the connection to another rank, whose own message says why"
        _report(line, to_launcher=False)
        time.sleep(MAIN_RANK_TIMEOUT_S)  # the rank that failed first must end first
        return 1
    except KeyboardInterrupt:
        _report(f"{name}: interrupted", to_launcher=False)
        return 130


def start_logging() -> None:
    """Log this project's messages at INFO on the main rank, and warnings of all packages on every rank.

    Credentials of URLs are removed.
    """
    from shards.commands.progress import LogHandler  # not at the top: --help answers without tqdm

    handler = LogHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for name in ("trainer", "shards"):
        logging.getLogger(name).setLevel(level)


def _lost_a_rank(error: RuntimeError) -> bool:
    """Return whether a collective failed because another of its processes exited; gloo has no error class for it."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):  # NCCL; the store
        pattern = "remote process exit|remote peer|by peer|Broken pipe|remote server shutdown"
        return bool(re.search(pattern, str(error)))
    return "/gloo/" in str(error) and bool(re.search("by peer|Broken pipe", str(error)))


def _report(line: str, *, to_launcher: bool = True) -> None:
    """Print a line to stderr, and write it to the file with which torch's launcher ends its own report."""
    line = redact(line)
    say(line, sys.stderr)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and to_launcher:
        Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
