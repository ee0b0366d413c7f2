"""Signals to a comparison, in real processes: the current training saves and ends, and no process remains."""

import fcntl
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from tests.support import REPOSITORY
from tests.trainer import tiny
from trainer.commands import launcher, train

COMPARE = REPOSITORY / "trainer" / "compare.py"


def steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def test_ctrl_c_ends_the_current_training_saved_and_another_number_of_ranks_resumes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"settings": {"one": {}, "two": {}}}))
    settings = {"train__steps_per_epoch": 500, "train__checkpoint_steps": 500}
    words = [str(tmp_path / "c.yaml"), *tiny.arguments(dataset, tmp_path / "runs", **settings)]
    run = tmp_path / "runs" / "one"
    process = tiny.start(COMPARE, [*words, "--launch", shlex.join(tiny.launch_options(2))], group=0)
    while steps(run) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process in the foreground receives it
    err = process.communicate(timeout=120)[1]  # returns when no process has stderr open any more
    step = steps(run)
    assert process.returncode == 128 + signal.SIGINT
    assert f"train: stopped by a signal after step {step}, which is saved in {run}" in err
    assert err.splitlines()[-1] == "compare: stopped by a signal at 'one': the same command resumes from there"
    assert "KeyboardInterrupt" not in err
    assert not (tmp_path / "runs" / "two").exists()

    before = signal.getsignal(signal.SIGTERM)
    tiny.before_step(monkeypatch, step + 1, tiny.send_sigterm)
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert train.main(tiny.arguments(dataset, run, **settings)) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert f"continuing {run} from step {step}" in caplog.text
    assert [row["step"] for row in tiny.rows(run / "metrics.jsonl")] == list(range(1, step + 2))


def test_a_signal_before_a_rank_exists_ends_the_rank_when_it_registers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom trainer.commands.launcher import register_rank\nregister_rank()\ntime.sleep(100)\n"
    )
    options = [*tiny.launch_options(1), "--cpu"]
    assert launcher.launch(script, [], options, [signal.SIGINT]) == 128 + signal.SIGINT  # 0 after the sleep


def test_launch_returns_the_status_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\nfrom trainer.commands import command_line\n"
        "def action():\n    if os.environ['RANK'] == '0':\n        time.sleep(100)\n    return 7\n"
        "sys.exit(command_line.run('script', action))\n"
    )
    assert launcher.launch(script, [], tiny.launch_options(2), []) == 7


def test_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launcher.RANKS, str(tmp_path))
    for of_launcher, of_ranks, noted, expected in (
        (0, [], [], 0),
        (0, [], [signal.SIGINT], 0),  # it came too late
        (1, [], [], 1),
        (1, [2, 1], [], 2),
        (1, [143], [signal.SIGINT], 130),  # every signal is passed on as SIGTERM
        (1, [], [signal.SIGTERM], 143),
        (1, [2], [signal.SIGTERM], 2),  # what the signal asked to be saved is not saved
    ):
        (tmp_path / launcher.STATUS).unlink(missing_ok=True)
        for status in of_ranks:
            launcher.leave_status(status)
        found = launcher._exit_status(of_launcher, tmp_path / launcher.STATUS, noted)
        assert found == expected, (of_launcher, of_ranks, noted)


def test_a_rank_is_registered_until_it_exits(tmp_path: Path) -> None:
    code = "import os\nfrom trainer.commands import launcher\nlauncher.register_rank()\n"
    code += "print(os.listdir(os.environ[launcher.RANKS]) == [str(os.getpid())])"
    environment = tiny.environment(**{launcher.RANKS: str(tmp_path)})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert not list(tmp_path.iterdir())


RANK = """
import os, signal, sys, threading
from trainer.commands import launcher
launcher.WATCH_S = launcher.GRACE_S = 0.02
launcher.register_rank()
print("started", flush=True)
if len(sys.argv) > 1:  # it waits for a rank that is gone
    signal.signal(signal.SIGTERM, lambda number, frame: print("noted", flush=True))
while True:
    threading.Event().wait(1)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@pytest.mark.parametrize("arguments", [[], ["deaf"]])
def test_a_rank_ends_when_its_launcher_is_killed(arguments: list[str]) -> None:
    more = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", PARENT, RANK, *arguments]
    process = subprocess.Popen(command, env=tiny.environment(**more), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.kill()
    assert process.stdout.read() == ("noted\n" if arguments else "")  # returns when the rank has ended
    process.stdout.close()
    process.wait()


def test_a_rank_watches_the_process_that_launched_its_launcher(tmp_path: Path) -> None:
    locked = tmp_path / launcher.LOCKED
    assert not launcher._is_unlocked(locked)  # started by no `launch`
    with open(locked, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not launcher._is_unlocked(locked)
    assert launcher._is_unlocked(locked)


def test_a_rank_without_a_launch_does_not_look_for_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watch = Mock()
    monkeypatch.setattr("threading.Thread", watch)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.delenv(launcher.RANKS, raising=False)
    launcher.register_rank()
    assert watch.call_args.kwargs["args"] == (os.getppid(), None)
    (tmp_path / launcher.LOCKED).touch()  # a file of that name in the working folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "is_ending", Mock(is_set=Mock(return_value=True)))
    parents = iter([1, 1, 2])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(launcher, "WATCH_S", 0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    launcher.end_with(1, None)
    assert not list(parents)  # it watched until the parent changed


def test_a_rank_that_saves_after_ctrl_c_is_not_signalled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for is_set in (False, True):
        monkeypatch.setattr(launcher, "is_ending", Mock(is_set=Mock(return_value=is_set)))
        launcher.end_with(-1, tmp_path)
    assert sent == [signal.SIGTERM]


def test_each_signal_is_passed_on_to_each_rank_once(monkeypatch: pytest.MonkeyPatch) -> None:
    received: Counter[int] = Counter()

    def kill(pid: int, number: int) -> None:
        received[pid] += 1
        if pid > 2:  # it exited, or is another user's
            raise {3: ProcessLookupError, 4: PermissionError}[pid]

    monkeypatch.setattr(os, "kill", kill)
    sent: Counter[int] = Counter()
    for signals, ranks, expected in (
        (0, [1], {}),
        (1, [1], {1: 1}),
        (1, [1, 2], {1: 1, 2: 1}),  # rank 2 started after the signal
        (2, [1, 2, 3, 4], {1: 2, 2: 2, 3: 2, 4: 2}),
        (2, [1, 2], {1: 2, 2: 2, 3: 2, 4: 2}),
    ):
        launcher.pass_on(signals, ranks, sent)
        assert received == expected


def test_an_ignored_signal_stays_ignored() -> None:
    """As under `nohup`."""
    before, other = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with launcher.noted_signals() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert noted == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is other
    finally:
        signal.signal(signal.SIGHUP, before)
