"""Run a script under `accelerate launch`, and pass signals on to the ranks that it starts.

A signal is meant for the ranks: each saves and ends, and then the launcher ends by itself. The launcher cannot pass it
on: with a single rank it ends at once and leaves the rank running, with several it kills them after 30 s. And Ctrl-C in
a terminal reaches every process in the foreground: a signal that is passed on as well would be the second one of a
rank, which ends it at once. So the launcher runs in a session without the terminal, every rank registers itself in a
folder that an environment variable names, and each signal is passed on to each rank once.
"""

import atexit
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
STATUS = "status"  # file in that folder: exit status of the rank that failed first
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
    """Run a script under `accelerate launch` and return its exit status, 0 only if every rank ended with 0.

    Args:
        script: what each rank runs; it must call `register_rank`, and may call `leave_status`.
        arguments: of the script.
        options: of `accelerate launch`.
        noted: from `noted_signals`; for each of its entries, present or future, every rank receives one SIGTERM.

    Returns:
        128 + the first noted signal if it ended the ranks, else the status of the rank that failed first, if it left
        one, else the launcher's.
    """
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options]
    with tempfile.TemporaryDirectory(prefix="maskstream-") as ranks:
        environment = {**os.environ, RANKS: ranks}
        process = subprocess.Popen([*accelerate, str(script), *arguments], start_new_session=True, env=environment)
        sent: Counter[int] = Counter()
        while True:
            try:
                return _exit_status(process.wait(timeout=POLL_S), Path(ranks, STATUS), noted)
            except subprocess.TimeoutExpired:
                if noted:
                    pass_on(len(noted), (int(name) for name in os.listdir(ranks) if name != STATUS), sent)


def register_rank() -> None:
    """Let the `launch` that started this process, if any, pass signals on to it until it exits."""
    if RANKS in os.environ:
        file = Path(os.environ[RANKS], str(os.getpid()))
        with suppress(OSError):  # that `launch` has ended
            file.touch()
            atexit.register(file.unlink, missing_ok=True)


def leave_status(status: int) -> None:
    """Let the `launch` that started this process, if any, return its exit status, unless another rank failed before."""
    if RANKS in os.environ and status:
        with suppress(OSError), open(Path(os.environ[RANKS], STATUS), "x", encoding="utf-8") as file:
            file.write(str(status))


def default_options() -> list[str]:
    """Return the options of `accelerate launch` for all GPUs; none if the user has configured accelerate."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    if os.path.isfile(default_config_file):
        return []
    # Everything that accelerate would otherwise report as not given.
    processes = max(torch.cuda.device_count(), 1)
    several = ["--multi_gpu"] if processes > 1 else []
    common = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*several, "--num_processes", str(processes), *common]


def pass_on(signals: int, ranks: Iterable[int], sent: Counter[int]) -> None:
    """Send SIGTERM to each rank (a process id) until `sent`, which is updated, counts as many as there were signals."""
    for rank in ranks:
        while sent[rank] < signals:
            sent[rank] += 1
            with suppress(ProcessLookupError, PermissionError):  # it exited, and its process id may have been reused
                os.kill(rank, signal.SIGTERM)


def _exit_status(launcher: int, file: Path, noted: Sequence[int]) -> int:
    """Return what `launch` returns, from the launcher's exit status and the file that `leave_status` writes."""
    if launcher == 0:
        return 0
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    status = int(text) if text else None
    if noted and status in (None, 128 + signal.SIGTERM):
        return 128 + noted[0]
    return launcher if status is None else status
