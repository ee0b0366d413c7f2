from pathlib import Path
from unittest.mock import Mock

import pytest

from shards.common.errors import StorageError
from shards.storage import retry
from shards.storage.location import Location


def test_errors_that_may_pass_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.common.back_off.SCALE", 0)
    busy, refused = StorageError("busy"), StorageError("refused", permanent=True)
    assert retry.retrying(Mock(side_effect=[busy] * (retry.ATTEMPTS - 1) + ["done"])) == "done"
    for error, attempts in ((busy, retry.ATTEMPTS), (refused, 1)):
        action = Mock(side_effect=error)
        with pytest.raises(StorageError, match=str(error)):
            retry.retrying(action)
        assert action.call_count == attempts


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_create_never_overwrites(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = f"s3://{request.getfixturevalue('bucket')}" if kind == "s3" else str(tmp_path / "new")
    place = Location(root) / "a" / "b"
    assert retry.create(place, b"1")
    assert not retry.create(place, b"2")
    assert place.read() == b"1"


def test_create_reports_a_store_without_conditional_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    cause, refused = Exception(), OSError("not implemented")
    cause.response = {"Error": {"Code": "NotImplemented"}}  # type: ignore[attr-defined]
    refused.__cause__ = cause
    place = Location("memory://create/a")
    monkeypatch.setattr(place.fs, "pipe_file", Mock(side_effect=refused))
    assert not retry.create(place, b"1")
