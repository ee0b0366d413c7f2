"""Fixtures of the tests of reading."""

from collections.abc import Callable

import pytest

from demo.s3proxy import S3Proxy


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Point this process, and loader processes forked from it, at a running proxy.

    `timeout_s` is the read timeout: short only for faults that stall, because a busy machine exceeds a short one by
    itself. `attempts` is the number of failures in a row after which a read is given up.
    """

    def point(proxy: S3Proxy, timeout_s: float = 60, attempts: int = 5) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        monkeypatch.setattr("shards.storage.location._instances", {})
        monkeypatch.setattr("shards.storage.location.READ_TIMEOUT_S", timeout_s)
        monkeypatch.setattr("shards.storage.ranges.ATTEMPTS", attempts)
        monkeypatch.setattr("shards.storage.ranges.BACK_OFF_S", 0.01)
        monkeypatch.setattr("shards.common.back_off.SCALE", 0.05)

    return point
