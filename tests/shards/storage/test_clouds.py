"""Google Cloud Storage and Azure, by real servers."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from unittest.mock import Mock

import pytest

from shards.common.errors import StorageError
from shards.storage import retry
from shards.storage.clouds import azure
from shards.storage.location import Location
from shards.storage.object_store import find_settings, open_object
from shards.storage.reads import Read, describe_many, read_many
from tests.cloud_servers import ACCOUNT, KEY, CloudServer, connection_string
from tests.support import forget_connections

DATA = bytes(range(256)) * 100
NAMES = ["plain", "a b", "50%", "100%25", "tag#1", "x?y=1&z", "[x]{1}", "q'uote\"", "ä日本", "p|q~*", "a/b/c"]


def one_line_error(action: Callable[[], object]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return caught.value


def test_objects_of_any_name_are_written_read_and_removed(cloud: str) -> None:
    root = Location(f"{cloud}/folder")
    for name in NAMES:
        (root / name).write(name.encode() + DATA)
    whole = read_many([Read(root / name) for name in NAMES])
    assert [bytes(data) for data in whole if not isinstance(data, Exception)] == [n.encode() + DATA for n in NAMES]
    assert [(root / name).read() for name in NAMES] == [name.encode() + DATA for name in NAMES]
    assert open_object(root / "plain") is not None  # it was obstore that read them
    (root / "a").delete(recursive=True)
    (root / "tag#1").delete()
    found = [path.partition("/folder/")[2] for path in root.fs.find(root.path)]
    assert sorted(found) == sorted({*NAMES} - {"a/b/c", "tag#1"})


def test_ranges_and_etags(cloud: str) -> None:
    place = Location(f"{cloud}/data")
    place.write(DATA)
    [described] = describe_many([place])
    assert not isinstance(described, Exception)
    assert described.size == len(DATA)
    ranges = [Read(place, 100, 20_000, etag=described.etag), Read(place, 25_000, 99_999), Read(place, 99_998, 99_999)]
    assert [bytes(data) for data in read_many(ranges) if not isinstance(data, Exception)] == [
        DATA[100:20_000],
        DATA[25_000:],
        b"",
    ]
    if cloud.startswith("az"):  # fake-gcs-server ignores If-Match
        place.write(b"another" + DATA)
        [answer] = read_many([Read(place, 0, 10, etag=described.etag)])
        assert str(answer) == "the object is no longer the one that was described"


def test_create_never_overwrites(cloud: str) -> None:
    place = Location(f"{cloud}/a/b")
    assert retry.create(place, b"1")
    assert not retry.create(place, b"2")
    assert place.read() == b"1"


def test_what_does_not_exist_is_one_line(cloud: str) -> None:
    missing, nowhere = Location(f"{cloud}/none"), Location(f"{cloud}-not/none")
    kind = "bucket" if cloud.startswith("gs") else "container"
    for place, action, message in (
        (missing, missing.read, "there is no such object"),
        (nowhere, lambda: nowhere.write(b"1"), f"the {kind} does not exist: create it, or correct the URL"),
    ):
        error = one_line_error(action)
        assert str(error) == f"{place}: {message}"
        assert error.permanent
        assert error.missing is (place is missing)
    [answer] = read_many([Read(missing, 0, 10)])
    assert isinstance(answer, FileNotFoundError)
    assert not missing.exists()
    missing.delete()


def test_no_server_is_one_line(cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.common.back_off.SCALE", 0.001)
    monkeypatch.setattr("shards.storage.location.CLOUD_ATTEMPTS", 1)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:1")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string("http://127.0.0.1:1"))
    forget_connections(monkeypatch)
    place = Location(f"{cloud}/x")
    for action in (place.read, place.exists, lambda: place.write(b"1")):
        message = str(one_line_error(action))
        assert message.startswith(f"{place}: the endpoint cannot be reached (Cannot connect to host 127.0.0.1:1 ")
        assert "AccountKey" not in message


@pytest.fixture
def azurite(az_server: CloudServer, monkeypatch: pytest.MonkeyPatch) -> CloudServer:
    """The server, and variables that obstore has and adlfs has not: they must not count."""
    others = {"AZURE_STORAGE_TOKEN": "x", "AZURE_SKIP_SIGNATURE": "true", "AZURE_STORAGE_USE_EMULATOR": "true"}
    for name, value in {**az_server.variables, **others, "AZURE_ENDPOINT": "http://127.0.0.1:1"}.items():
        monkeypatch.setenv(name, value)
    forget_connections(monkeypatch)
    return az_server


@pytest.mark.slow
def test_a_wrong_account_key_is_one_line(azurite: CloudServer, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = connection_string(azurite.address, f"AccountKey=AAAA{KEY[4:]}")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", wrong)
    place = Location("az://container/x")
    for action in (place.read, place.exists, lambda: place.write(b"1")):
        error = one_line_error(action)
        assert str(error).startswith(f"{place}: access was refused (AuthorizationFailure: ")
        assert error.permanent
    [answer] = read_many([Read(place, 0, 10)])
    assert isinstance(answer, PermissionError)
    assert str(answer).startswith("HTTP 403 AuthorizationFailure: Server failed to authenticate the request.")


@pytest.mark.slow
def test_a_shared_access_signature_and_a_public_container(
    azurite: CloudServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from azure.storage.blob import BlobServiceClient, generate_container_sas

    azurite.make_bucket("signed")
    client = BlobServiceClient.from_connection_string(connection_string(azurite.address))
    client.create_container("public", public_access="blob")
    for container in ("signed", "public"):
        Location(f"az://{container}/x").write(DATA)
    until = datetime.now(UTC) + timedelta(hours=1)
    signature = generate_container_sas(ACCOUNT, "signed", account_key=KEY, permission="rl", expiry=until)
    secret = f"SharedAccessSignature={signature}"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(azurite.address, secret))
    forget_connections(monkeypatch)
    signed, unsigned = Location("az://signed/x"), Location("az://public/x", anonymous=True)
    assert read_many([Read(signed, 1, 3), Read(unsigned, 1, 3)]) == [DATA[1:3]] * 2
    assert signed.read() == unsigned.read() == DATA
    assert isinstance(read_many([Read(Location(signed.url, anonymous=True), 1, 3)])[0], OSError)
    for place in (signed, unsigned):  # the signature is for reading
        assert "access was refused" in str(one_line_error(partial(place.write, b"1")))


AMAZING = "https://amazing.blob.core.windows.net"


@pytest.mark.parametrize(
    ("variables", "url", "anonymous", "expected"),
    [
        ({"KEY": "a2V5"}, "az://c/x", False, {"account_key": "a2V5", "credential_type": "access_key"}),
        ({"SAS_TOKEN": "?sig=1"}, "abfs://c/x", False, {"sas_key": "sig=1", "credential_type": "sas_token"}),
        ({"KEY": "a2V5", "NAME": "other"}, "abfss://c@amazing.dfs.core.windows.net/x", True, {"skip_signature": True}),
        ({"ANON": "true"}, "az://c/x", False, {"skip_signature": True}),
    ],
)
def test_azure_accounts_are_those_of_adlfs(
    variables: dict[str, str], url: str, anonymous: bool, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("adlfs")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    names = {"KEY": "ACCOUNT_KEY", "NAME": "ACCOUNT_NAME"}
    for name, value in {"NAME": "amazing", **variables}.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{names.get(name, name)}", value)
    forget_connections(monkeypatch)
    found = find_settings(Location(url, anonymous=anonymous))
    assert found is not None
    assert (found.kind, found.bucket, found.address, found.renewable) == ("az", "c", AMAZING, False)
    account = {"account_name": "amazing", "endpoint": AMAZING, "use_emulator": False, "skip_signature": False}
    assert found.config == {**account, **expected}


def test_other_paths_of_a_store_keep_scheme_and_account() -> None:
    for url in ("az://c", "abfs://c", "abfss://c@amazing.dfs.core.windows.net"):
        assert Location(f"{url}/a").sibling("c/b/x.jpg").url == f"{url}/b/x.jpg"
    assert Location("s3://c/a").sibling("c/b/x.jpg").url == "s3://c/b/x.jpg"


def test_azure_without_credentials_or_account_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = pytest.importorskip("azure.identity.aio")
    error = Exception("DefaultAzureCredential failed to retrieve a token\nAttempted credentials: ...")
    monkeypatch.setattr(identity.DefaultAzureCredential, "get_token", Mock(side_effect=error))
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    place = Location("az://container/x")
    forget_connections(monkeypatch)
    assert "no storage account is given: set AZURE_STORAGE_CONNECTION_STRING or" in str(one_line_error(place.read))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "amazing")
    refused = one_line_error(place.read)
    assert str(refused).startswith(f"{place}: no Azure credentials were found: set AZURE_STORAGE_CONNECTION_STRING,")
    assert refused.permanent


def test_azure_tokens_are_asked_of_the_credential_of_adlfs(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(9))

    async def get_token(_: object, scope: str, **__: object) -> Mock:
        return Mock(token=f"{scope} {next(numbers)}")

    credential = pytest.importorskip("azure.identity.aio").DefaultAzureCredential
    monkeypatch.setattr(credential, "get_token", get_token)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "amazing")
    forget_connections(monkeypatch)
    place = Location("az://container/x")
    found = find_settings(place)
    assert found is not None
    assert found.renewable
    ask = azure.credentials(place.fs)
    assert [ask()["token"] for _ in range(2)] == [f"https://storage.azure.com/.default {n}" for n in (1, 2)]


@pytest.mark.parametrize(("url", "package"), [("gs://b/x", "gcsfs"), ("abfss://c/x", "adlfs")])
def test_a_missing_package_is_one_line(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (package, f"{package}.core"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    monkeypatch.setattr("shards.storage.location.CLOUD_ATTEMPTS", 7)  # a class that was not made before
    forget_connections(monkeypatch)
    message = str(one_line_error(Location(url).read))
    assert message.startswith(f"{url}: no file system for {url.partition('://')[0]}:// (")
    assert message.endswith(f"): pip install {package}")
