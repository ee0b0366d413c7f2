"""A script under `accelerate launch`, and the signals that end it.

The launcher starts a process for each GPU, a rank. A signal is for the ranks: each saves and ends, then the launcher
ends by itself. Sent to the launcher it does less: one that has a single rank dies and leaves it running, one that has
several kills them after 30 s. And Ctrl-C in a terminal reaches every process of the foreground, whose ranks would take
a signal that is passed on as their second, which ends them at once. So the launcher is started apart from the terminal,
and each signal is passed on to each rank once.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# SIGHUP: of a terminal that is closed. Whoever started the launcher with `nohup` has it ignored, and it stays so.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL_S = 0.1


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within it, the signals of `ENDING` end nothing: they are put into the list that it gives. For the main thread."""
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    taken = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def launch(script: Path, arguments: Sequence[str], options: Sequence[str], noted: Sequence[int]) -> int:
    """Run a script under `accelerate launch` to its end.

    Args:
        script: what each rank runs.
        arguments: of the script.
        options: of `accelerate launch`.
        noted: from `noted_signals`; for each that is or comes into it, every rank is sent SIGTERM.

    Returns:
        The launcher's exit status; it tells nothing of the ranks' but whether it was 0.
    """
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options]
    process = subprocess.Popen([*accelerate, str(script), *arguments], start_new_session=True)
    told: Counter[int] = Counter()
    while True:
        try:
            return process.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            _pass_on(len(noted), _ranks(process.pid, script) if noted else [], told)


def _pass_on(signals: int, ranks: Sequence[psutil.Process], told: Counter[int]) -> None:
    """Send each rank as many SIGTERM as there were signals, less what it was `told` already."""
    for rank in ranks:
        while told[rank.pid] < signals:
            told[rank.pid] += 1
            with suppress(psutil.NoSuchProcess):
                rank.terminate()


def _ranks(launcher: int, script: Path) -> list[psutil.Process]:
    """The launcher's children that run the script: none while it starts up, perhaps with helpers of its own."""
    ranks = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher).children():
            with suppress(psutil.Error):  # it has just ended
                if str(script) in child.cmdline():
                    ranks.append(child)
    return ranks
