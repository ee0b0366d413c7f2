import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from builder.target.build_lock import LOCK_FILE, SETTLE_S, STALE_S, BuildLock, Holder, read_lock, refuse_if_held
from shards.common.errors import UserError
from shards.storage import retry
from shards.storage.location import Location
from tests.support import REPOSITORY

HOLD = "import sys, time; from builder.target.build_lock import *; from shards.storage.location import Location\n"
HOLD += "with BuildLock(Location(sys.argv[1])): print('held', flush=True); time.sleep(60)"


class Clock:
    """A clock that only moves when something sleeps, or by hand."""

    def __init__(self) -> None:
        self.seconds = 1e9

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lock(root: Location, clock: Clock) -> BuildLock:
    return BuildLock(root, clock.now, clock.sleep)


@pytest.fixture(params=["local", "s3", "s3 without conditional puts"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    if request.param == "local":
        return Location(str(tmp_path / "out"))
    if "without" in request.param:
        monkeypatch.setattr("shards.storage.retry.create", lambda location, data: False)
    return Location(f"s3://{request.getfixturevalue('bucket')}/out")


def lock_of(clock: Clock, **others: object) -> bytes:
    holder = {"token": "t", "build": "process 1 on elsewhere, started 2026-01-01T00:00:00+00:00"}
    return json.dumps({**holder, "beat": clock.now(), **others}).encode()


def test_a_second_build_is_refused_until_the_lock_is_released(root: Location, clock: Clock) -> None:
    with lock(root, clock) as held:
        held.check()
        for refused in (lambda: refuse_if_held(root, clock.now), lambda: lock(root, clock).__enter__()):
            with pytest.raises(UserError, match=rf"process {os.getpid()} on .*started 20.*{LOCK_FILE}"):
                refused()
    assert read_lock(root) is None


def test_a_build_that_creates_its_lock_a_moment_later_is_refused(
    root: Location, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, other = retry.create, lock_of(clock)

    def late(location: Location, data: bytes) -> bool:
        location.write(other)
        return create(location, data)

    monkeypatch.setattr("shards.storage.retry.create", late)
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        lock(root, clock).__enter__()
    assert (root / LOCK_FILE).read() == other


def test_the_last_of_two_builds_that_take_over_a_lock_holds_it(root: Location, clock: Clock) -> None:
    (root / LOCK_FILE).write(lock_of(clock, beat=0))
    first, second = lock(root, clock), BuildLock(root, clock.now, lambda _: None)

    def second_writes_too(seconds: float) -> None:
        clock.sleep(seconds)
        (root / LOCK_FILE).write(second._content())

    first._sleep = second_writes_too
    with pytest.raises(UserError, match="another build started at the same moment: run the command again"):
        first.__enter__()
    assert clock.seconds == pytest.approx(1e9 + SETTLE_S)
    assert second._is_mine()


def test_the_lock_of_a_killed_process_on_this_machine_is_taken_over_at_once(
    root: Location, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", HOLD, root.url]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UserError, match=f"process {process.pid} "):
            refuse_if_held(root)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with caplog.at_level("INFO"), BuildLock(root, sleep=lambda _: None):
        pass
    assert f"taking over the lock of process {process.pid} " in caplog.text


def test_only_a_lock_whose_process_died_on_this_machine_is_stale_at_once(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Location(str(tmp_path / "out"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with lock(root, clock):  # another container has the same host name and process ids, and another temporary folder
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))
        with pytest.raises(UserError, match="another build is at work"):
            refuse_if_held(root, clock.now)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with pytest.raises(UserError, match="another build is at work"):
            refuse_if_held(root, clock.now)
    assert not list(tmp_path.glob("maskstream-*"))
    (root / LOCK_FILE).write(lock_of(clock))
    Path(Holder("t", "", 0).mark).touch()  # as a killed process leaves it
    assert refuse_if_held(root, clock.now) is not None


def test_a_lock_without_a_heartbeat_expires(tmp_path: Path, clock: Clock) -> None:
    root = Location(str(tmp_path))
    (root / LOCK_FILE).write(lock_of(clock))
    clock.seconds += STALE_S - 1
    with pytest.raises(UserError, match=r"process \d+ on elsewhere.*10 minutes.*remove .*\.build\.lock"):
        refuse_if_held(root, clock.now)
    clock.seconds += 2
    with lock(root, clock) as held:
        held.check()
    assert read_lock(root) is None


def test_a_damaged_lock_is_taken_over_unless_it_is_being_written(root: Location, clock: Clock) -> None:
    (root / LOCK_FILE).write(b'{"token": "a')
    with lock(root, clock):
        with pytest.raises(UserError, match="another build is at work"):
            refuse_if_held(root, clock.now)
    assert read_lock(root) is None
    (root / LOCK_FILE).write(lock_of(clock, beat="now"))
    found = refuse_if_held(root, clock.now)
    assert found is not None
    assert not found.token
    (root / LOCK_FILE).write(b"")
    late = BuildLock(root, clock.now, lambda _: (root / LOCK_FILE).write(lock_of(clock)))
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        late.__enter__()


WRONG_LOCKS = [b"[]", b"7", b"null", b'"x"', b"[" * 100_000, b"\xff"]
WRONG_VALUES: list[dict[str, object]] = [
    {"beat": float("nan")},
    {"beat": float("inf")},
    {"beat": 10**400},
    {"beat": "1"},
    {"beat": None},
]
WRONG_VALUES += [{"token": 1}, {"token": "../../x"}, {"token": "a\0"}, {"build": ["x"]}]
WRONG_VALUES += [{"beat": 1e9 + STALE_S + 1}, {"beat": 1e300}]


def test_a_lock_of_wrong_types_or_of_the_future_does_not_block(tmp_path: Path, clock: Clock) -> None:
    root = Location(str(tmp_path))
    for data in [*WRONG_LOCKS, *(lock_of(clock, **value) for value in WRONG_VALUES)]:
        (root / LOCK_FILE).write(data)
        with lock(root, clock) as held:
            held.check()
        clock.seconds = 1e9
    (root / LOCK_FILE).write(lock_of(clock, beat=1e9 + 1, build="a\nb\x1b[2J"))  # a clock may be a little ahead
    with pytest.raises(UserError, match=r"at work there: a\\nb\\x1b\[2J: wait for it"):
        refuse_if_held(root, clock.now)


def test_a_heartbeat_renews_the_lock_and_notices_its_loss(tmp_path: Path, clock: Clock) -> None:
    root = Location(str(tmp_path))
    with lock(root, clock) as held:
        clock.seconds += STALE_S - 1
        held.beat()
        clock.seconds += STALE_S - 1
        with pytest.raises(UserError, match="another build is at work"):
            refuse_if_held(root, clock.now)
        held.check()
        other = lock_of(clock)
        (root / LOCK_FILE).write(other)
        held.beat()
        with pytest.raises(UserError, match="took over"):
            held.check()
    assert (root / LOCK_FILE).read() == other  # the lock of the other build stays


def test_heartbeats_are_sent_while_the_lock_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = threading.Event()
    monkeypatch.setattr("builder.target.build_lock.BEAT_S", 0.001)
    monkeypatch.setattr(BuildLock, "beat", lambda self: sent.set())
    with BuildLock(Location(str(tmp_path))):
        assert sent.wait(60)
