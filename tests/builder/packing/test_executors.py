import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.packing.executors import Engine, execute
from demo.scenes import SceneTruth
from shards.common.errors import UserError
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import build, mirror, quotas
from tests.support import REPOSITORY

CHOICE = quotas(("Person", "Car"), 30, 5, images_per_shard=8)

SCHEDULER = """
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
        print(cluster.scheduler_address, flush=True)
        input()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("distributed")
    script = tmp_path_factory.mktemp("dask") / "scheduler.py"
    script.write_text(SCHEDULER)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("\n", timeout=30)


def square(number: int) -> int:
    return number * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number: int) -> int:
    raise UserError(f"number {number} is refused")


class NeedsTwoError(Exception):
    def __init__(self, text: str, number: int) -> None:  # unpickling gives it only the text
        super().__init__(text)


def fail_without_pickling(number: int) -> int:
    raise NeedsTwoError("cannot be rebuilt", number) if number else ValueError("cannot be pickled", lambda: None)


@pytest.mark.parametrize("workers", [1, 2])
def test_execute_runs_every_task_once_and_raises_the_error_of_a_task(workers: int) -> None:
    done = dict(execute(square, range(23), Engine(workers)))
    assert done == {number: number * number for number in range(23)}
    assert list(execute(square, [], Engine(workers))) == []
    with pytest.raises(UserError, match=r"^number \d is refused$"):
        list(execute(refuse, [0, 1], Engine(workers)))
    if workers == 2:
        with pytest.raises(UserError, match=r"a worker process died.*run the same command again to resume"):
            list(execute(die, [1, 2, 3], Engine(workers)))


@pytest.mark.parametrize(("number", "text"), [(0, "cannot be pickled"), (1, "NeedsTwoError: cannot be rebuilt")])
def test_an_error_that_cannot_be_sent_is_reported_with_its_traceback(number: int, text: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?s)in fail_without_pickling.*{text}"):
        list(execute(fail_without_pickling, [number] * 2, Engine(2)))


def test_workers_without_a_task_end_quietly() -> None:
    code = "from builder.packing.executors import Engine, execute; from tests.builder.packing.test_executors import "
    code += "square; assert all(len(list(execute(square, range(8), Engine(4)))) == 8 for _ in range(3))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_workers_end_with_the_iteration() -> None:
    before = set(multiprocessing.active_children())
    results = execute(square, range(9), Engine(2))
    next(results)
    assert len(set(multiprocessing.active_children()) - before) == 2
    results.close()  # type: ignore[attr-defined]
    assert set(multiprocessing.active_children()) == before


@pytest.mark.slow
def test_a_dask_cluster_packs_the_same_bytes(cluster: str, scenes: SceneTruth, tmp_path: Path) -> None:
    for name, engine in (("local", Engine(2)), ("cluster", Engine(cluster=cluster))):
        build(mirror(scenes), CHOICE, Location(str(tmp_path / name)), engine=engine)
    local, clustered = (open_dataset(tmp_path / name).info for name in ("local", "cluster"))
    assert local == clustered
    assert len(local.shards) > 3


def test_an_unreachable_cluster_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("builder.packing.executors.CLUSTER_TIMEOUT_S", 1)
    with pytest.raises(UserError, match=r"--cluster tcp://127.0.0.1:9: no Dask scheduler answers"):
        list(execute(square, [1], Engine(cluster="tcp://127.0.0.1:9")))
