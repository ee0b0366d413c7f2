from pathlib import Path

import pytest

from shards.common.errors import StorageError
from shards.storage import retry
from shards.storage.location import Location


@pytest.mark.parametrize(
    ("failures", "error", "attempts"),
    [
        (retry.ATTEMPTS - 1, StorageError("busy"), retry.ATTEMPTS),
        (99, StorageError("busy"), retry.ATTEMPTS),
        (99, StorageError("refused", permanent=True), 1),
    ],
)
def test_errors_that_may_pass_are_retried(
    monkeypatch: pytest.MonkeyPatch, failures: int, error: StorageError, attempts: int
) -> None:
    monkeypatch.setattr("shards.common.back_off.SCALE", 0)
    done: list[int] = []

    def action() -> str:
        done.append(1)
        if len(done) <= failures:
            raise error
        return "done"

    if failures < retry.ATTEMPTS:
        assert retry.retrying(action) == "done"
    else:
        with pytest.raises(StorageError, match=str(error)):
            retry.retrying(action)
    assert len(done) == attempts


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_create_never_overwrites(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = f"s3://{request.getfixturevalue('bucket')}" if kind == "s3" else str(tmp_path / "new")
    place = Location(root) / "a" / "b"
    assert retry.create(place, b"1")
    assert not retry.create(place, b"2")
    assert place.read() == b"1"


def test_create_reports_a_store_without_conditional_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    class RefusedError(Exception):
        response = {"Error": {"Code": "NotImplemented"}}  # noqa: RUF012

    def pipe_file(*_: object, **__: object) -> None:
        raise OSError("not implemented") from RefusedError()

    place = Location("memory://create/a")
    monkeypatch.setattr(place.fs, "pipe_file", pipe_file)
    assert not retry.create(place, b"1")
