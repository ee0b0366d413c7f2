"""Tokens and refusals of Google Cloud Storage, by a server that has them: fake-gcs-server lets everybody in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from shards.common.errors import StorageError
from shards.storage.location import Location
from shards.storage.object_store import find_settings
from shards.storage.reads import Read, read_many
from tests.shards.storage.test_reads import Handler, serving
from tests.support import forget_connections

ANONYMOUS = "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."


class Google(Handler):
    """Objects for those who have the newest token, and tokens for a service account, which expire at once."""

    tokens, withdrawn = 0, False
    payers: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        token = self.headers.get("Authorization")
        self.payers.append(self.headers.get("x-goog-user-project"))
        if token is None and "/storage/v1/" in self.path:
            self._answer(401, json.dumps({"error": {"code": 401, "message": ANONYMOUS}}))
        elif token is None:
            self._answer(403, f"<Error><Code>AccessDenied</Code><Message>Access denied.</Message>{DETAILS}</Error>")
        elif token != f"Bearer token-{self.tokens}":
            self._answer(401, "<Error><Code>AuthenticationRequired</Code><Message>Invalid.</Message></Error>")
        elif "nobucket" in self.path:
            self._answer(404, "<Error><Code>NoSuchBucket</Code><Message>The specified bucket ...</Message></Error>")
        else:
            self._answer(206 if self.headers.get("Range") else 200, "0123456789")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/token":
            self._answer(
                403, json.dumps({"error": {"code": 403, "message": "me does not have storage.objects.create"}})
            )
            return
        if self.withdrawn:
            self._answer(400, json.dumps({"error": "invalid_grant", "error_description": "account not found"}))
            return
        Google.tokens += 1
        self._answer(200, json.dumps({"access_token": f"token-{self.tokens}", "expires_in": 1}))

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Range", "bytes 0-9/10")
        self.send_header("Last-Modified", "Fri, 27 Nov 2026 03:34:48 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


DETAILS = f"<Details>{ANONYMOUS}</Details>"


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A server, and a service account of it in the file of `GOOGLE_APPLICATION_CREDENTIALS`."""
    pytest.importorskip("gcsfs")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    forms = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key = rsa.generate_private_key(65537, 2048).private_bytes(*forms).decode()
    with serving(Google) as url:
        account = {"type": "service_account", "client_email": "me@x", "private_key": key, "token_uri": f"{url}/token"}
        file = tmp_path / "account.json"
        file.write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setattr("shards.common.back_off.SCALE", 0.001)
        monkeypatch.setattr(Google, "tokens", 0)
        monkeypatch.setattr(Google, "withdrawn", False)
        monkeypatch.setattr(Google, "payers", [])
        forget_connections(monkeypatch)
        yield


def read(place: Location) -> Any:
    return read_many([Read(place, 0, 10)])[0]


def test_tokens_of_a_service_account_are_renewed(google: None, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location("gs://bucket/x")
    for _ in range(2):
        assert read(place) == b"0123456789"
        monkeypatch.setattr("shards.storage.object_store._stores", {})  # a store asks for a token before its first read
    assert Google.tokens > 2
    found = find_settings(place)
    assert found is not None
    assert found.renewable
    assert "token" not in str(found)  # credentials that expire do not cross a fork


def test_a_token_that_is_not_renewed_is_one_line(google: None, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location("gs://bucket/x")
    assert read(place) == b"0123456789"
    monkeypatch.setattr(Google, "withdrawn", True)
    monkeypatch.setattr("shards.storage.object_store._stores", {})
    answer = read(place)
    assert isinstance(answer, PermissionError)
    forget_connections(monkeypatch)
    with pytest.raises(StorageError) as caught:
        place.read()
    for error in (answer, caught.value):
        assert "the credentials could not be renewed: ('invalid_grant: account not found'" in str(error)
        assert "\n" not in str(error)


def test_the_project_that_pays_is_named(google: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("fsspec").config.conf, "gs", {"requester_pays": "payer"})
    assert read(Location("gs://bucket/x")) == b"0123456789"
    assert Google.payers == ["payer"]


def test_refusals_are_one_line_with_their_reason(google: None, monkeypatch: pytest.MonkeyPatch) -> None:
    place, unsigned = Location("gs://bucket/x"), Location("gs://bucket/x", anonymous=True)
    remedy = "no Google credentials were found: run `gcloud auth application-default login`, or set"
    answers = read(unsigned), read(Location("gs://nobucket/x"))
    assert [type(answer) for answer in answers] == [PermissionError, FileNotFoundError]
    assert str(answers[0]) == f"HTTP 403 AccessDenied: Access denied. {ANONYMOUS}"
    assert str(answers[1]) == "The specified bucket does not exist"
    for action, reason in (
        (unsigned.read, remedy),
        (unsigned.exists, remedy),
        (lambda: place.write(b"1"), "me does not have storage.objects.create"),
    ):
        with pytest.raises(StorageError) as caught:
            action()
        assert caught.value.permanent
        assert f"{place}: access was refused (" in str(caught.value)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_setup_that_obstore_cannot_express_is_read_by_gcsfs(google: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("fsspec").config.conf, "gs", {"version_aware": True})
    place = Location("gs://bucket/x")
    assert find_settings(place) is None
    assert read(place) == b"0123456789"
