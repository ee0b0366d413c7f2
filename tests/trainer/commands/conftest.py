"""Fixtures of the command tests."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.trainer import tiny


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny training."""
    monkeypatch.setattr("trainer.run.runlog.draw_curves", lambda steps, evaluations: b"\x89PNG")


@pytest.fixture
def fresh_accelerator() -> Iterator[Callable[[], None]]:
    """Make accelerate accept a new precision; it keeps the first one of a process. The value does so again."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    reset()
    yield reset
    reset()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `two_ranks.py` left, launched once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "two-ranks"
    with open(root / "two-ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            tiny.write_dataset(folder / "data")
            (folder / "file").touch()
            done = tiny.run(Path(__file__).with_name("two_ranks.py"), [str(folder)], ranks=2)
            (folder / "stderr").write_text(done.stderr)
    assert (folder / "rank-1.json").exists(), (folder / "stderr").read_text()
    return folder
