"""Fixtures of the trainer's tests."""

import fcntl
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from shards.format.dataset import Category
from tests.support import damage
from tests.trainer import tiny


@pytest.fixture(scope="session", autouse=True)
def _cheap_trainings() -> None:
    torch.set_num_threads(1)  # where this folder was named, torch is imported before OMP_NUM_THREADS is set
    gc.freeze()  # accelerate collects garbage in every stage: not among all that the tests imported


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 5 validation images of drawn shapes. Read only."""
    return tiny.write_dataset(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """The run folder of an untrained network, which finds something everywhere. Read only."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("untrained"), dataset)


@pytest.fixture(scope="session")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the same number of classes, of which the second differs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "CATEGORIES", (Category(1, "Square", "/m/sq"), Category(2, "Ring", "/m/ri")))
        return tiny.write_dataset(tmp_path_factory.mktemp("renamed"), samples=4, val=2)


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny training."""
    monkeypatch.setattr("trainer.run.runlog.draw_curves", lambda steps, evaluations, title: b"\x89PNG")


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
    """The folder that `two_ranks.py` left, run once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "two-ranks"
    with open(root / "two-ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            tiny.write_checkpoint(folder / "masks", tiny.write_dataset(folder / "data"), masks=True)
            damage(tiny.write_dataset(folder / "damaged", samples=12), {3: "json", 8: "image"})
            (folder / "file").touch()
            done = tiny.run(Path(__file__).parent / "commands" / "two_ranks.py", [str(folder)])
            (folder / "stderr").write_text(done.stderr)
    assert (folder / "rank-1.json").exists(), (folder / "stderr").read_text()
    return folder
