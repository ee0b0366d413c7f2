"""What the tests of reading share."""

from collections.abc import Callable

import pytest

from demo.s3proxy import S3Proxy


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Point this process, and loader processes forked from it, at a running proxy, with so much patience (seconds)."""

    def point(proxy: S3Proxy, patience: float = 0.5) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        monkeypatch.setattr("shards.storage.location._instances", {})
        monkeypatch.setattr("shards.storage.location.READ_TIMEOUT_S", patience)
        monkeypatch.setattr("shards.storage.ranges.BACK_OFF_S", 0.01)
        monkeypatch.setattr("shards.common.back_off.SCALE", 0.05)

    return point
