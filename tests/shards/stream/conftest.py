"""Fixtures of the tests of streams: one dataset of 60 samples in 6 shards, on S3 and on the local disk."""

from collections.abc import Iterator

import pytest

from demo.s3server import S3Server
from shards.format.dataset import Dataset, open_dataset
from tests.shards.stream.support import SAMPLES
from tests.support import sample, write_dataset


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    samples = {"train": [sample(n) for n in range(SAMPLES)]}
    return write_dataset(tmp_path_factory.mktemp("stream"), samples, per_shard=10)


@pytest.fixture(scope="session")
def root(s3: S3Server, local: Dataset) -> Iterator[str]:
    """The URL of the dataset on S3, which `open_dataset` opens through whatever proxy a test has started."""
    s3.make_bucket("stream-tests")
    s3.upload(local.root.path, "stream-tests")
    yield "s3://stream-tests"
    s3.filesystem().rm("stream-tests", recursive=True)


@pytest.fixture
def remote(root: str) -> Dataset:
    return open_dataset(root)
