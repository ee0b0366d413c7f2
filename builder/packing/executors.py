"""Run tasks in this process, in local processes or on a Dask cluster; this never changes a result."""

import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

from shards.common.errors import UserError
from shards.common.socket_folder import shorten_socket_paths
from shards.common.text import one_line

Task = TypeVar("Task")
Result = TypeVar("Result")

EARLY_WORKERS = 4  # processes that start before it is known how many tasks there are
TASKS_PER_WORKER = 2  # of a cluster: one runs, one waits; more would only occupy memory
CLUSTER_TIMEOUT_S = 20
PRELOADED = ["builder.packing.pack", "aiohttp", "botocore.auth", "botocore.session"]


@dataclass(frozen=True)
class Worker:
    """A process that waits for a function, and then for tasks, on the other end of a pipe."""

    process: BaseProcess
    pipe: connection.Connection


@dataclass(frozen=True)
class Engine:
    """Where tasks run: in local processes (1 is this process), or on the Dask scheduler with the address `cluster`."""

    workers: int = 1
    cluster: str = ""
    _early: list[Future[list[Worker]]] = field(default_factory=list, compare=False, repr=False)

    def warm_up(self, prepare: Callable[[], object]) -> None:
        """Start slow imports and a few processes in the background, and return at once.

        The fork server imports the modules that local workers need, and each process calls `prepare`, whose errors are
        left to the first task. This process imports pandas, which pyarrow otherwise imports when it first converts a
        list to an array. Processes that get no task end with this one, or when the engine is no longer used.
        """
        threading.Thread(target=importlib.import_module, args=("pandas",), daemon=True).start()
        if not self.cluster and self.workers > 1 and "forkserver" in multiprocessing.get_all_start_methods():
            pool = ThreadPoolExecutor(1)  # a process starts once the fork server has imported what it needs
            self._early.append(pool.submit(_start_workers, min(self.workers, EARLY_WORKERS), prepare))
            pool.shutdown(wait=False)

    def take_workers(self, count: int) -> list[Worker]:
        """Return `count` local processes, of which a few may have been started before."""
        found = [worker for early in self._early for worker in early.result()][:count]
        self._early.clear()
        return found + _start_workers(count - len(found))


IN_THIS_PROCESS = Engine()


def execute(function: Callable[[Task], Result], tasks: Sequence[Task], engine: Engine) -> Iterator[tuple[Task, Result]]:
    """Run the tasks in any order, and yield each with its result as soon as it is finished.

    An error of a task ends the iteration and cancels the unfinished tasks. UserError if a worker died, or the cluster
    cannot be reached.
    """
    workers = min(engine.workers, len(tasks))
    if engine.cluster:
        yield from _run_on_cluster(function, tasks, engine.cluster)
    elif workers > 1:
        yield from _run_in_processes(function, tasks, engine.take_workers(workers))
    else:
        for task in tasks:
            yield task, function(task)


def _start_workers(count: int, prepare: Callable[[], object] | None = None) -> list[Worker]:
    """Start fresh processes: file systems own threads and sockets, which must not be shared by a fork.

    A worker shares only a pipe with this process, and no lock or thread: it can be terminated at any time.
    """
    context, workers = _context(), []
    for _ in range(count):
        pipe, other_end = context.Pipe()
        process = context.Process(target=_work, args=(other_end, prepare), daemon=True)
        process.start()
        other_end.close()
        workers.append(Worker(process, pipe))
    return workers


def _run_in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: Sequence[Worker]
) -> Iterator[tuple[Task, Result]]:
    left = iter(tasks)
    running: dict[connection.Connection, Task] = {}
    try:
        for worker, task in zip(workers, islice(left, len(workers)), strict=True):
            with _death_reported():  # sending a large task waits until its worker has started
                worker.pipe.send(function)
                worker.pipe.send(task)
            running[worker.pipe] = task
        while running:
            for pipe in cast("list[connection.Connection]", connection.wait(list(running))):
                task = running.pop(pipe)
                with _death_reported():
                    error, result = pipe.recv()
                    for following in islice(left, 1):
                        pipe.send(following)
                        running[pipe] = following
                if error is not None:
                    raise error
                yield task, result
    finally:
        for worker in workers:
            worker.process.terminate()  # a half-finished shard is packed again by the build that resumes
            worker.process.join()


@contextmanager
def _death_reported() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise UserError(
            "a worker process died, perhaps because memory ran out: run the same command again to resume, with fewer "
            "--workers or a smaller --images-per-shard (the latter starts a new build)"
        ) from error


def _work(pipe: connection.Connection, prepare: Callable[[], object] | None) -> None:
    """Prepare, receive a function, and answer each task with it, until the pipe is closed."""
    gc.freeze()  # modules stay in memory, so the garbage collector need not scan them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Exit with the parent even if it is killed.
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    if prepare is not None:
        with suppress(Exception):
            prepare()  # what fails here fails again in a task, which reports it
    with suppress(EOFError, ConnectionError):  # the parent closes the pipe once it has no task left
        function = pipe.recv()
        while True:
            pipe.send_bytes(_answer(function, pipe.recv()))


def _answer(function: Callable[[Task], Result], task: Task) -> bytes:
    """Return a pickled pair of an error, or None, and a result; the pair can be unpickled."""
    try:
        return pickle.dumps((None, function(task)))
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(traceback.format_exc())
        with suppress(Exception):
            data = pickle.dumps((error, None))
            pickle.loads(data)  # noqa: S301 - made in the line above
            return data
        return pickle.dumps((RuntimeError(traceback.format_exc()), None))


def _run_on_cluster(
    function: Callable[[Task], Result], tasks: Sequence[Task], address: str
) -> Iterator[tuple[Task, Result]]:
    left = iter(tasks)
    with _dask(address) as (executor, workers):
        ahead = islice(left, TASKS_PER_WORKER * workers)
        running: dict[Future[Result], Task] = {executor.submit(function, task): task for task in ahead}
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
        raise UserError("--cluster needs Dask: pip install '.[cluster]'") from error
    try:
        client = Client(address, timeout=CLUSTER_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        reason = one_line(error)
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


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    shorten_socket_paths()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # imported once, not once per worker
    return context
