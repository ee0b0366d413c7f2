"""What the trainer's tests share."""

from pathlib import Path

import pytest
import torch

from tests.trainer import tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Several threads on tiny tensors wait for each other more than they work, above all on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 5 validation images of drawn shapes. Read only."""
    return tiny.write_dataset(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """The run folder of an untrained network, which finds something everywhere. Read only."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("untrained"), dataset)
