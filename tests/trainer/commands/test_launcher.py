"""Signals to a comparison, in real processes: the training under way saves and ends, and nothing stays behind."""

import os
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from tests.trainer import tiny
from trainer.commands import launcher

COMPARE = tiny.ROOT / "trainer" / "compare.py"


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def stop_at(step: int, run: Path, words: list[str], send: Callable[[int], None]) -> tuple[int, str]:
    """Start a comparison, send it a signal after that step, and wait till all of it is gone; its status and stderr."""
    process = tiny.start(COMPARE, words, group=0)
    wait_until(lambda: steps(run) >= step, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("train.py" in word for member in family for word in member.cmdline())
    send(process.pid)
    err = process.communicate(timeout=120)[1]
    left = psutil.wait_procs(family, timeout=10)[1]
    for member in left:
        member.kill()
    assert left == []
    return process.returncode, err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_ends_the_training_under_way_saved_and_the_same_command_goes_on(
    ranks: int, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"settings": {"one": {}, "two": {}}}))
    settings = {"train__steps_per_epoch": 500, "train__checkpoint_steps": 500, "data__workers": 1}
    words = [str(tmp_path / "c.yaml"), *tiny.arguments(dataset, tmp_path / "runs", **settings)]
    words += ["--launch", shlex.join(tiny.launch_options(ranks))]
    run = tmp_path / "runs" / "one"

    status, err = stop_at(2, run, words, lambda pid: os.kill(pid, signal.SIGTERM))
    first = steps(run)
    assert status == 128 + signal.SIGTERM
    assert f"train: stopped by a signal after step {first}, which is saved in {run}" in err
    told = "compare: stopped by a signal at 'one': the same command resumes from there"
    assert err.splitlines()[-1] == told
    assert "KeyboardInterrupt" not in err

    # Ctrl-C goes to all of the foreground.
    status, err = stop_at(first + 1, run, words, lambda pid: os.killpg(pid, signal.SIGINT))
    assert status == 128 + signal.SIGINT
    assert f"continuing {run} from step {first}\n" in err
    assert f"train: stopped by a signal after step {steps(run)}, which is saved in {run}" in err
    assert err.splitlines()[-1] == told
    assert "KeyboardInterrupt" not in err
    assert [row["step"] for row in tiny.rows(run / "metrics.jsonl")] == list(range(1, steps(run) + 1))
    assert not (tmp_path / "runs" / "two").exists()


@pytest.mark.slow
def test_a_signal_before_there_is_a_rank_ends_it_when_it_comes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom trainer.commands.launcher import register_rank\nregister_rank(); time.sleep(100)"
    )
    began = time.monotonic()
    assert launcher.launch(script, [], [*tiny.launch_options(1), "--cpu"], [signal.SIGTERM]) == 1
    assert time.monotonic() - began < 90


def test_each_signal_is_passed_on_to_each_rank_once(monkeypatch: pytest.MonkeyPatch) -> None:
    received: Counter[int] = Counter()
    monkeypatch.setattr(os, "kill", lambda pid, number: received.update([pid]))
    sent: Counter[int] = Counter()
    for signals, ranks, expected in (
        (0, [1], {}),
        (1, [1], {1: 1}),
        (1, [1, 2], {1: 1, 2: 1}),  # rank 2 started after the signal
        (2, [1, 2], {1: 2, 2: 2}),
        (2, [1, 2], {1: 2, 2: 2}),
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
