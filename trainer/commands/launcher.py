"""Run a script under `accelerate launch`, and pass signals on to the ranks that it starts.

A signal is meant for the ranks: each saves and ends, and then the launcher ends by itself. The launcher cannot pass it
on: with a single rank it ends at once and leaves the rank running, with several it kills them after 30 s. And Ctrl-C in
a terminal reaches every process in the foreground: a signal that is passed on as well would be the second one of a
rank, which ends it at once. So the launcher runs in a session without the terminal, every rank registers itself in a
folder that an environment variable names, and each signal is passed on to each rank once.

A launcher that is killed (SIGKILL) passes on nothing. So every rank watches its parent and, through a locked file in
that folder, the process of `launch`; when one of them is gone, it ends as by SIGTERM, and if it is one of several, at
the latest after GRACE_S.
"""

import atexit
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# SIGHUP: a terminal is closed. `nohup` ignores it, and an ignored signal stays ignored.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RANKS = "MASKSTREAM_RANKS"  # environment variable: a folder with one empty file per rank, named by its process id
STATUS = "status"  # file in that folder: exit status of the rank that failed first
POLL_S = 0.1
LOCKED = "launcher"  # file in that folder, which `launch` keeps locked as long as it lives
WATCH_S = 1.0
GRACE_S = 30.0  # for one of several ranks to finish its step and save: it may also wait forever for one that is gone
# Set by `launch`, by torch's launcher, and by `accelerate launch` with one process: the parent is a launcher. Without
# one, a script under `nohup` must survive its parent. (People set other variables of accelerate themselves.)
LAUNCHED = (RANKS, "TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")

is_ending = threading.Event()  # set once this process has received a signal that it ends by


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
    with tempfile.TemporaryDirectory(prefix="maskstream-") as ranks, open(Path(ranks, LOCKED), "w") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        environment = {**os.environ, RANKS: ranks}
        process = subprocess.Popen([*accelerate, str(script), *arguments], start_new_session=True, env=environment)
        sent: Counter[int] = Counter()
        while True:
            try:
                return _exit_status(process.wait(timeout=POLL_S), Path(ranks, STATUS), noted)
            except subprocess.TimeoutExpired:
                if noted:
                    pass_on(len(noted), map(int, filter(str.isdecimal, os.listdir(ranks))), sent)


def register_rank() -> None:
    """Let the `launch` that started this process, if any, pass signals on to it until it exits; see `end_with`."""
    if any(name in os.environ for name in LAUNCHED):
        locked = Path(os.environ[RANKS], LOCKED) if RANKS in os.environ else None
        threading.Thread(target=end_with, args=(os.getppid(), locked), daemon=True).start()
    if RANKS in os.environ:
        file = Path(os.environ[RANKS], str(os.getpid()))
        with suppress(OSError):  # that `launch` has ended
            file.touch()
            atexit.register(file.unlink, missing_ok=True)


def end_with(parent: int, locked: Path | None) -> None:
    """Wait until the parent process is another one, or nobody locks a file, if one is given; then end this process."""
    wait = threading.Event().wait  # `time.sleep` is the commands' own, which tests replace
    while os.getppid() == parent and not (locked and _is_unlocked(locked)):
        wait(WATCH_S)
    if not is_ending.is_set():  # a second signal would end it at once
        os.kill(os.getpid(), signal.SIGTERM)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        wait(GRACE_S)
        os._exit(128 + signal.SIGTERM)


def _is_unlocked(file: Path) -> bool:
    """Return whether a file that exists is locked by no process."""
    with suppress(OSError), open(file) as opened:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    return False


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
