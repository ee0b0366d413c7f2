from pathlib import Path

import pytest

from shards.common.errors import StorageError
from shards.storage import retry
from shards.storage.location import Location


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.common.back_off.SCALE", 0)


def failing(times: int, error: StorageError) -> tuple[list[int], object]:
    tries: list[int] = []

    def action() -> str:
        tries.append(1)
        if len(tries) <= times:
            raise error
        return "done"

    return tries, action


def test_what_may_pass_is_tried_again_and_no_more_than_said() -> None:
    tries, action = failing(retry.ATTEMPTS - 1, StorageError("busy"))
    assert retry.retrying(action) == "done"  # type: ignore[arg-type]
    assert len(tries) == retry.ATTEMPTS
    tries, action = failing(99, StorageError("busy"))
    with pytest.raises(StorageError, match="busy"):
        retry.retrying(action)  # type: ignore[arg-type]
    assert len(tries) == retry.ATTEMPTS


def test_what_cannot_pass_is_not_tried_again() -> None:
    tries, action = failing(99, StorageError("refused", permanent=True))
    with pytest.raises(StorageError):
        retry.retrying(action)  # type: ignore[arg-type]
    assert len(tries) == 1


def test_writes_and_deletes_are_those_of_the_location(tmp_path: Path) -> None:
    place = Location(str(tmp_path / "a" / "b"))
    retry.write(place, b"x")
    assert place.read() == b"x"
    retry.delete(place)
    retry.delete(place)
    assert not place.exists()


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
