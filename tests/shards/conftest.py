import pytest

from shards.format.dataset import Dataset
from tests.support import sample, write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """40 samples in train and 7 in val: each has a person, and those with odd numbers a car as well. Read only."""
    splits = {"train": [sample(n) for n in range(40)], "val": [sample(n) for n in range(100, 107)]}
    return write_dataset(tmp_path_factory.mktemp("data"), splits)
