"""Everything here that depends on internals of torch's `DataLoader` and of `multiprocessing`.

Tested with torch 2.14.1; an earlier form of it also with 2.11. torch promises none of it: `_workers` and
`_shutdown_workers` of the iterator of a `DataLoader`, its handler of SIGCHLD, and its exception if a worker has died.
"""

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

from shards.common.errors import LoaderError

WHY_KILLED = (
    "usually the kernel kills it because memory runs out (see dmesg): use fewer workers (workers=, or --data.workers "
    "of a command) or less read-ahead (read_ahead=, or --data.read_ahead_mb); in a container, raise its limits of "
    "memory and shared memory"
)

OWN_ERROR = (
    "its own error is printed above; if the start method is spawn or forkserver, the script that reads the loader must "
    'do so under `if __name__ == "__main__":`'
)

# The texts of torch's RuntimeError: from the handler of SIGCHLD, and from a wait for a batch (within 5 s).
_WORKER_DIED = re.compile(r"DataLoader worker \(pid(\(s\))? ")


@contextmanager
def running(loader: Any) -> Iterator[Iterator[Any]]:
    """Start the workers of a `DataLoader`, yield its iterator, and end the workers with the block."""
    iterator = iter(loader)
    _ignore_sigchld_errors()
    try:
        yield iterator
    finally:
        # The garbage collector would end them after it has closed their queues, and then wait 5 s for each.
        if hasattr(iterator, "_shutdown_workers"):  # not without workers
            iterator._shutdown_workers()


def receive(iterator: Iterator[Any]) -> Any:
    """Return the next item of a `DataLoader`'s iterator, None at the end; a LoaderError if a worker has died."""
    try:
        return next(iterator, None)
    except RuntimeError as error:
        if not _WORKER_DIED.match(str(error)):
            raise
        raise dead_worker(iterator) or LoaderError(f"{error}: {WHY_KILLED}") from None


def dead_worker(iterator: Iterator[Any]) -> LoaderError | None:
    """Return the error for a worker that was killed or crashed; None if there is none."""
    for worker in getattr(iterator, "_workers", ()):
        code = worker.exitcode
        if code:
            return LoaderError(f"loader process (pid {worker.pid}) {_how_it_ended(code)}")
    return None


def _how_it_ended(code: int) -> str:
    """Return what an exit code of `multiprocessing` says; only a SIGKILL may be the kernel's, for lack of memory."""
    if code > 0:
        return f"ended with exit status {code}: {OWN_ERROR}"
    why = (
        WHY_KILLED if code == -signal.SIGKILL else "the kernel's answer to a crash in a library, or a kill from outside"
    )
    return f"was killed by signal: {signal.strsignal(-code)}: {why}"


def _ignore_sigchld_errors() -> None:
    """Keep torch from raising the death of a worker wherever the main thread happens to be; `receive` reports it.

    Raised by its handler of SIGCHLD in a finalizer it would be lost, in a library it may surface as any other error.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and not isinstance(handler, _WithoutWorkerDeaths):
        signal.signal(signal.SIGCHLD, _WithoutWorkerDeaths(handler))


@dataclass
class _WithoutWorkerDeaths:
    """A handler of SIGCHLD that drops torch's errors about dead workers."""

    handler: Any

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            if not _WORKER_DIED.match(str(error)):
                raise


def ignore_lost_readers() -> None:
    """In a loader process: print no traceback if the process that reads its batches is gone.

    `multiprocessing` sends file descriptors in a thread, and reports an error there through `sys.excepthook`.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            previous(kind, error, trace)

    sys.excepthook = hook


def reduce_tensor(tensor: Any) -> Any:
    """Return what torch registers with `multiprocessing` to send a tensor."""
    return ForkingPickler._extra_reducers[type(tensor)](tensor)  # type: ignore[attr-defined]
