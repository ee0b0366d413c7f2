"""Run a script under `accelerate launch`, and pass signals on to the ranks that it starts.

A signal is meant for the ranks: each saves and ends, and then the launcher ends by itself. The launcher cannot pass it
on: with a single rank it ends at once and leaves the rank running, with several it kills them after 30 s. And Ctrl-C in
a terminal reaches every process in the foreground: a signal that is passed on as well would be the second one of a
rank, which ends it at once. So the launcher runs in a session without the terminal, every rank registers itself in a
folder that an environment variable names, and each signal is passed on to each rank once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# SIGHUP: a terminal is closed. `nohup` ignores it, and an ignored signal stays ignored.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RANKS = "MASKSTREAM_RANKS"  # environment variable: a folder with one empty file per rank, named by its process id
POLL_S = 0.1


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collect the signals of `ENDING` in a list instead of ending the process; only for the main thread."""
    noted: list[int] = []
    handled = [number for number in ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in handled}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(script: Path, arguments: Sequence[str], options: Sequence[str], noted: Sequence[int]) -> int:
    """Run a script under `accelerate launch`; return the launcher's exit status, 0 only if every rank ended with 0.

    Args:
        script: what each rank runs; it must call `register_rank`.
        arguments: of the script; `options` are those of `accelerate launch`.
        noted: from `noted_signals`; for each of its entries, present or future, every rank receives one SIGTERM.
    """
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options]
    with tempfile.TemporaryDirectory(prefix="maskstream-") as ranks:
        environment = {**os.environ, RANKS: ranks}
        process = subprocess.Popen([*accelerate, str(script), *arguments], start_new_session=True, env=environment)
        sent: Counter[int] = Counter()
        while True:
            try:
                return process.wait(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                if noted:
                    pass_on(len(noted), map(int, os.listdir(ranks)), sent)


def register_rank() -> None:
    """Let the `launch` that started this process, if any, pass signals on to it."""
    if RANKS in os.environ:
        Path(os.environ[RANKS], str(os.getpid())).touch()


def pass_on(signals: int, ranks: Iterable[int], sent: Counter[int]) -> None:
    """Send SIGTERM to each rank (a process id) until `sent`, which is updated, counts as many as there were signals."""
    for rank in ranks:
        while sent[rank] < signals:
            sent[rank] += 1
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGTERM)
