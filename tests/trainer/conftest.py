"""Fixtures of the trainer's tests."""

import gc
from pathlib import Path

import pytest
import torch

from tests.trainer import tiny


@pytest.fixture(scope="session", autouse=True)
def _cheap_trainings() -> None:
    # On tiny tensors several threads mostly wait for each other.
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage in every stage: not among all that the tests imported


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 5 validation images of drawn shapes. Read only."""
    return tiny.write_dataset(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """The run folder of an untrained network, which finds something everywhere. Read only."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("untrained"), dataset)
