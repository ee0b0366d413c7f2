import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from builder.target import build_lock as lock
from builder.target.build_lock import LOCK_FILE, Holder, hold, read_lock, refuse_if_held
from demo.s3server import S3Server
from shards.common.errors import UserError
from shards.storage.location import Location
from tests.support import REPOSITORY

HOLD = "import sys, time; from builder.target.build_lock import hold; from shards.storage.location import Location\n"
HOLD += "with hold(Location(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.target.build_lock.SETTLE_S", 0.2)


@pytest.fixture(params=["local", "s3", "s3 without conditions"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    if request.param == "local":
        return Location(str(tmp_path / "out"))
    if "without" in request.param:
        monkeypatch.setattr("builder.target.build_lock.SETTLE_S", 1.0)
        monkeypatch.setattr(
            "builder.target.build_lock._put_new", lambda location, content: location.write(content) or True
        )
    return Location(f"s3://{request.getfixturevalue('bucket')}/out")


def held_by(pid: int, host: str, machine: str, beat: float, born: str = "1") -> bytes:
    return json.dumps(asdict(Holder("t", host, pid, machine, born, "2026-01-01T00:00:00+00:00", beat))).encode()


def test_a_lock_is_held_by_one_and_gone_afterwards(root: Location) -> None:
    with hold(root) as held:
        held.check()
        for refused in (lambda: refuse_if_held(root), lambda: hold(root).__enter__()):
            with pytest.raises(UserError, match=rf"process {os.getpid()} on .*started 20.*{LOCK_FILE}"):
                refused()
    assert read_lock(root) is None
    refuse_if_held(root)
    with hold(root):
        pass


def test_of_many_at_once_one_gets_it(root: Location) -> None:
    got: list[bool] = []
    go, end = threading.Barrier(6), threading.Event()

    def contend() -> None:
        go.wait()
        try:
            with hold(root):
                got.append(True)
                end.wait(10)
        except UserError:
            got.append(False)
        if len(got) == 6:
            end.set()

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(got) < 6:
        time.sleep(0.01)
    end.set()
    for thread in threads:
        thread.join()
    assert sum(got) == 1


def test_the_lock_of_a_killed_process_is_taken_over(root: Location, caplog: pytest.LogCaptureFixture) -> None:
    command = [sys.executable, "-c", HOLD, root.url]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UserError, match=f"process {process.pid} "):
            refuse_if_held(root)
        process.send_signal(signal.SIGKILL)
        process.wait()
    refuse_if_held(root)
    with caplog.at_level("INFO"), hold(root):
        pass
    assert [record.message for record in caplog.records if "taken over" in record.message]


def test_another_machine_counts_as_dead_when_its_heart_has_stopped(tmp_path: Path) -> None:
    root = Location(str(tmp_path))
    place = root / LOCK_FILE
    place.write(held_by(1, "elsewhere", "other machine", time.time() - lock.STALE_S / 2))
    with pytest.raises(UserError, match=r"process 1 on elsewhere.*10 minutes.*remove .*\.build\.lock"):
        refuse_if_held(root)
    place.write(held_by(1, "elsewhere", "other machine", time.time() - 2 * lock.STALE_S))
    with hold(root):
        pass
    assert not place.exists()


def test_a_process_number_given_to_another_process_is_no_holder(tmp_path: Path) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system does not tell when a process started")
    root = Location(str(tmp_path))
    (root / LOCK_FILE).write(held_by(os.getpid(), "here", lock._machine(), time.time(), born="1"))
    refuse_if_held(root)


def test_a_lock_half_written_when_killed_is_no_obstacle(root: Location) -> None:
    (root / LOCK_FILE).write(b'{"token": "a')
    with hold(root):
        assert read_lock(root) is not None
    assert read_lock(root) is None


def test_the_holder_renews_its_lock_and_notices_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.target.build_lock.BEAT_S", 0.02)
    root = Location(str(tmp_path))
    with hold(root) as held:
        first = read_lock(root)
        assert first is not None
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and read_lock(root) == first:
            time.sleep(0.01)
        renewed = read_lock(root)
        assert renewed is not None
        assert renewed == replace(first, beat=renewed.beat) != first
        held.check()
        monkeypatch.setattr("builder.target.build_lock.BEAT_S", 60.0)
        other = held_by(1, "elsewhere", "other", time.time())
        while not held._lost and time.monotonic() < deadline:
            (root / LOCK_FILE).write(other)
            time.sleep(0.05)
        with pytest.raises(UserError, match="taken over"):
            held.check()
    assert (root / LOCK_FILE).read() == other  # never the lock of another


def test_s3_conditions_are_known_here(s3: S3Server, bucket: str) -> None:
    place = Location(f"s3://{bucket}/lock")
    assert lock._put_new(place, b"1")
    assert not lock._put_new(place, b"2")
    assert place.read() == b"1"
