"""Run tasks in this process, in local processes or on a Dask cluster.

Each of these is a `concurrent.futures.Executor`; which one is used never changes a result.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection, forkserver
from typing import Any, TypeVar

from shards.common.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_PER_WORKER = 2  # submitted at a time: one runs, one waits; more would only occupy memory
CLUSTER_TIMEOUT_S = 20
PRELOADED = ["builder.packing.pack", "aiohttp", "botocore.auth", "botocore.session"]


@dataclass(frozen=True)
class Engine:
    """Where tasks run.

    Attributes:
        workers: number of local processes; 1 runs tasks in this process.
        cluster: address of a Dask scheduler, such as `tcp://scheduler:8786`, whose workers have this package
            installed; "" for local processes.
    """

    workers: int = 1
    cluster: str = ""


IN_THIS_PROCESS = Engine()


def execute(function: Callable[[Task], Result], tasks: Sequence[Task], engine: Engine) -> Iterator[tuple[Task, Result]]:
    """Run the tasks in any order, and yield each with its result as soon as it is finished.

    An error of a task ends the iteration and cancels the unfinished tasks.

    Raises:
        UserError: a worker died, or the cluster cannot be reached.
    """
    if not engine.cluster and min(engine.workers, len(tasks)) <= 1:
        for task in tasks:
            yield task, function(task)
        return
    pool = _dask(engine.cluster) if engine.cluster else _processes(min(engine.workers, len(tasks)))
    try:
        with pool as (executor, workers):
            yield from _run_all(executor, function, tasks, TASKS_PER_WORKER * workers)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps because memory ran out: run the same command again to resume, with fewer "
            "--workers or a smaller --images-per-shard (the latter starts a new build)"
        ) from error


def _run_all(
    executor: Executor, function: Callable[[Task], Result], tasks: Sequence[Task], ahead: int
) -> Iterator[tuple[Task, Result]]:
    left = iter(tasks)
    running: dict[Future[Result], Task] = {executor.submit(function, task): task for task in islice(left, ahead)}
    while running:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            task = running.pop(future)
            yield task, future.result()
            running |= {executor.submit(function, following): following for following in islice(left, 1)}


@contextmanager
def _dask(address: str) -> Iterator[tuple[Executor, int]]:
    """Yield an executor and its number of workers."""
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError("--cluster needs Dask: pip install 'maskstream[cluster]'") from error
    try:
        client = Client(address, timeout=CLUSTER_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        reason = " ".join(str(error).split())
        raise UserError(f"--cluster {address}: no Dask scheduler answers ({reason}): check the address") from error
    with client:
        workers = sum(client.nthreads().values())
        if not workers:
            raise UserError(f"--cluster {address}: the scheduler has no workers: start some (dask worker {address})")
        # pure=False: otherwise Dask returns the cached result of an equal task.
        executor = client.get_executor(pure=False)
        try:
            yield executor, workers
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
        executor.shutdown()


def warm_up(engine: Engine) -> None:
    """Start slow imports in the background, and return at once.

    The fork server imports the modules that local workers need. This process imports pandas, which pyarrow otherwise
    imports when it first converts a list to an array.
    """
    threading.Thread(target=importlib.import_module, args=("pandas",), daemon=True).start()
    if not engine.cluster and engine.workers > 1 and "forkserver" in multiprocessing.get_all_start_methods():
        _context()
        forkserver.ensure_running()


@contextmanager
def _processes(workers: int) -> Iterator[tuple[Executor, int]]:
    """Yield a pool of fresh processes: file systems own threads and sockets, which must not be shared by a fork."""
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, mp_context=_context(), initializer=_start_worker)
    try:
        yield executor, workers
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # a half-finished shard is packed again by the build that resumes
        raise
    executor.shutdown()


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # imported once, not once per worker
    return context


def _start_worker() -> None:
    """Initialise a worker: ignore Ctrl-C, which the parent handles, and exit with the parent even if it is killed."""
    gc.freeze()  # modules stay in memory, so the garbage collector need not scan them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
