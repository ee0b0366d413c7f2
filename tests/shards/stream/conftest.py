"""Fixtures of the tests of streams: one dataset of 60 samples in 6 shards, on S3 and on the local disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from demo.s3proxy import Fault, S3Proxy
from demo.s3server import S3Server
from shards.format.dataset import Dataset, open_dataset
from tests.shards.stream.support import SAMPLES, Proxied
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


@pytest.fixture
def proxied(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Proxied:
    """Start a proxy with faults, through which this process, and loader processes forked from it, read S3.

    `timeout_s` is the read timeout: short only for faults that stall, because a busy machine exceeds a short one by
    itself. `attempts` is the number of failures in a row after which a read is given up.
    """

    @contextmanager
    def start(*faults: Fault, timeout_s: float = 60, attempts: int = 5, **options: Any) -> Iterator[S3Proxy]:
        with S3Proxy(s3.endpoint_url, faults, **options) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            monkeypatch.setattr("shards.storage.location._instances", {})
            monkeypatch.setattr("shards.storage.location.READ_TIMEOUT_S", timeout_s)
            monkeypatch.setattr("shards.storage.ranges.ATTEMPTS", attempts)
            monkeypatch.setattr("shards.storage.ranges.BACK_OFF_S", 0.01)
            monkeypatch.setattr("shards.common.back_off.SCALE", 0.05)
            yield proxy

    return start
