"""Signals to a comparison, in real processes: the current training saves and ends, and no process remains."""

import os
import shlex
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.trainer import tiny
from trainer.commands import launcher

COMPARE = tiny.ROOT / "trainer" / "compare.py"


def steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def stop_at(step: int, run: Path, words: list[str], send: Callable[[int], None]) -> tuple[int, str]:
    """Start a comparison and send it a signal after that step; returns its status and stderr."""
    process = tiny.start(COMPARE, words, group=0)
    while steps(run) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    send(process.pid)
    stderr = process.communicate(timeout=120)[1]  # returns when no process has stderr open any more
    return process.returncode, stderr


@pytest.mark.slow
def test_a_signal_ends_the_current_training_saved_and_the_same_command_resumes(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"settings": {"one": {}, "two": {}}}))
    settings = {"train__steps_per_epoch": 500, "train__checkpoint_steps": 500, "data__workers": 1}
    words = [str(tmp_path / "c.yaml"), *tiny.arguments(dataset, tmp_path / "runs", **settings), "--launch"]
    run = tmp_path / "runs" / "one"

    status, err = stop_at(
        2, run, [*words, shlex.join(tiny.launch_options(2))], lambda pid: os.kill(pid, signal.SIGTERM)
    )
    first = steps(run)
    assert status == 128 + signal.SIGTERM
    assert f"train: stopped by a signal after step {first}, which is saved in {run}" in err
    message = "compare: stopped by a signal at 'one': the same command resumes from there"
    assert err.splitlines()[-1] == message
    assert "KeyboardInterrupt" not in err

    # Ctrl-C reaches every process in the foreground. The number of ranks may differ.
    one_rank = [*words, shlex.join(tiny.launch_options(1))]
    status, err = stop_at(first + 1, run, one_rank, lambda pid: os.killpg(pid, signal.SIGINT))
    assert status == 128 + signal.SIGINT
    assert f"continuing {run} from step {first}\n" in err
    assert f"train: stopped by a signal after step {steps(run)}, which is saved in {run}" in err
    assert err.splitlines()[-1] == message
    assert "KeyboardInterrupt" not in err
    assert [row["step"] for row in tiny.rows(run / "metrics.jsonl")] == list(range(1, steps(run) + 1))
    assert not (tmp_path / "runs" / "two").exists()


@pytest.mark.slow
def test_a_signal_before_a_rank_exists_ends_the_rank_when_it_registers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom trainer.commands.launcher import register_rank\nregister_rank()\ntime.sleep(100)\n"
    )
    options = [*tiny.launch_options(1), "--cpu"]
    assert launcher.launch(script, [], options, [signal.SIGTERM]) == 1  # 0 after the sleep


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
