"""Stores of obstore, which read objects of S3, Google Cloud Storage, Azure and http(s) by blocking calls in threads.

Addresses and credentials are those that fsspec's file system for the URL has found (s3fs, gcsfs, adlfs): the usual
variables and files (`AWS_PROFILE`, ...) have one meaning, and a process that forks loader processes finds them once.

obstore must not cross a fork: its threads do not exist in the child, where a read would hang without an error. A
process that was forked from one that had used it reads through fsspec instead.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from fsspec.asyn import sync

from shards.storage import location as storage
from shards.storage.location import Location

log = logging.getLogger(__name__)

SLOWEST_BODY_S = 30  # an answer is cut off after this time, and continued if it brought `PROGRESS` bytes
# botocore and google-auth renew credentials in good time whenever they are asked; obstore asks again after this time.
CREDENTIALS_TTL = timedelta(minutes=5)


@dataclass(frozen=True)
class Settings:
    """What it takes to open a store: plain values, which may cross a fork.

    Attributes:
        kind: of the store: "s3", "gs", "az" or "http".
        bucket: or container; for http the URL of the server.
        config: the store's configuration, by obstore's names.
        renewable: credentials expire, and each process gets its own from fsspec's file system.
    """

    kind: str
    bucket: str
    config: dict[str, Any] = field(default_factory=dict)
    renewable: bool = False


class Opened(NamedTuple):
    """An object: its store, its path there, and the settings of the store."""

    store: Any
    path: str
    settings: Settings


_Root = tuple[str, str, bool]  # protocol, bucket or host, anonymous
_settings: dict[_Root, Settings] = {}
_stores: dict[tuple[int, _Root], tuple[Any, Settings]] = {}  # by process: a forked child does not use its parent's
_user: int | None = None  # the process that first used obstore, of this one and those it was forked from


def open_object(location: Location) -> Opened | None:
    """Return an object's store; None if it is read through fsspec.

    Raises:
        Exception: fsspec's file system's, if settings or credentials are missing or wrong.
    """
    split = _split(location)
    if split is None or not _usable():
        return None
    root, path = split
    key = (os.getpid(), root)
    if (opened := _stores.get(key)) is None:
        with _lock(os.getpid()):  # the first reads of a process all start at the same moment
            if (opened := _stores.get(key)) is None:
                settings = find_settings(location)
                assert settings is not None
                opened = _stores[key] = (_new_store(settings, location), settings)
    store, settings = opened
    return Opened(store, path, settings)


@cache
def _lock(process: int) -> threading.Lock:
    """Return the lock of this process: a thread of its parent may have had its own at the moment of the fork."""
    return threading.Lock()


def find_settings(location: Location) -> Settings | None:
    """Return the settings of a location's store, found once; None if it is read through fsspec.

    A process that calls this before it forks saves its children the time; nothing of obstore is used. Raises as
    `open_object`.
    """
    split = _split(location)
    if split is None:
        return None
    root = split[0]
    if root not in _settings:
        _settings[root] = _FINDERS[root[0]](location, root[1])
    return _settings[root]


def move_to_region(opened: Opened, location: Location, region: str) -> bool:
    """Use the region of a bucket of S3 (if "", ask S3 for it) from now on; False if `opened` has used that already."""
    settings, (root, _) = opened.settings, _split(location) or (None, "")
    region = region or (_region_of(location.fs, settings.bucket) if settings.kind == "s3" else "")
    if root is None or region in ("", settings.config.get("region")):
        return False
    if _settings[root].config["region"] != region:  # another thread has not done it
        _settings[root] = replace(settings, config={**settings.config, "region": region})
        _stores.pop((os.getpid(), root), None)
    return True


def _usable() -> bool:
    """Return whether this process may use obstore; the first call decides, and logs if it may not."""
    global _user
    process = os.getpid()
    if _user == process:
        return True
    with _lock(process):
        if _user is None:
            _user = process
        if _user not in (process, -1):
            log.warning(
                "this process was forked from one that had read from storage itself, so it reads more slowly, through "
                "fsspec: start loader processes before the first loop without them, or with start_method='forkserver'"
            )
            _user = -1  # logged
        return _user == process


def _split(location: Location) -> tuple[_Root, str] | None:
    """Return the root of a location's store and the path of the object in it; None if obstore does not read it."""
    protocol = _ALIASES.get(location.protocol, location.protocol)
    if protocol not in _FINDERS:
        return None
    if protocol in ("http", "https"):
        parts = urlsplit(location.url)
        path = unquote(parts.path.removeprefix("/"))
        # A signed link, a password, or an escaped slash: the URL is sent as it is.
        plain = not (parts.query or parts.fragment or "@" in parts.netloc or "%2f" in parts.path.lower())
        root = (protocol, f"{protocol}://{parts.netloc}", False)
    else:
        bucket, _, path = location.url.partition("://")[2].partition("/")
        plain, root = True, (protocol, bucket, location.anonymous)
    # obstore's paths have no empty, "." or ".." parts, which the keys of a store may have.
    plain = plain and (not path or not {"", ".", ".."}.intersection(path.split("/")))
    return (root, path) if plain else None


def _s3_settings(location: Location, bucket: str) -> Settings:
    """Return what botocore has found out about a bucket: endpoint, region and credentials."""
    fs = location.fs
    client = fs.s3
    endpoint, style = client.meta.endpoint_url, (client.meta.config.s3 or {}).get("addressing_style")
    config: dict[str, Any] = {"region": client.meta.region_name or "us-east-1"}
    if ".amazonaws.com" in endpoint:  # obstore knows the addresses of Amazon's regions
        config["virtual_hosted_style_request"] = "." not in bucket  # no certificate covers a bucket with dots
    elif style == "virtual":
        scheme, _, host = endpoint.partition("://")
        config |= {"endpoint": f"{scheme}://{bucket}.{host}", "virtual_hosted_style_request": True}
    else:
        config["endpoint"] = endpoint
    if fs.req_kw.get("RequestPayer"):
        config["request_payer"] = True
    if location.anonymous:
        return Settings("s3", bucket, {**config, "skip_signature": True})
    credentials = client._request_signer._credentials
    if credentials is None:
        from botocore.exceptions import NoCredentialsError

        raise NoCredentialsError
    if type(credentials).__name__ != "AioCredentials":
        return Settings("s3", bucket, config, renewable=True)
    config |= {"access_key_id": credentials.access_key, "secret_access_key": credentials.secret_key}
    if credentials.token:
        config["session_token"] = credentials.token
    return Settings("s3", bucket, config)


def _s3_credentials(location: Location) -> Callable[[], dict[str, Any]]:
    """Return a function that obstore calls for credentials, which botocore renews."""

    def credentials() -> dict[str, Any]:
        fs = location.fs
        until = datetime.now(UTC) + CREDENTIALS_TTL
        frozen = sync(fs.loop, fs.s3._request_signer._credentials.get_frozen_credentials)
        names = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key}
        return {**names, "token": frozen.token, "expires_at": until}

    return credentials


def _region_of(fs: Any, bucket: str) -> str:
    """Ask S3 for a bucket's region; even the answer of a refusal has it."""
    try:
        answer = sync(fs.loop, fs.s3.head_bucket, Bucket=bucket)
    except Exception as error:
        answer = getattr(error, "response", None) or {}
    return str(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region", ""))


def _http_settings(location: Location, server: str) -> Settings:
    return Settings("http", server)


_ALIASES = {"s3a": "s3"}
_FINDERS: dict[str, Callable[[Location, str], Settings]] = {
    "s3": _s3_settings,
    "http": _http_settings,
    "https": _http_settings,
}


def _new_store(settings: Settings, location: Location) -> Any:
    from obstore.store import HTTPStore, S3Store

    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=storage.CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=storage.READ_TIMEOUT_S),
        "timeout": timedelta(seconds=max(SLOWEST_BODY_S, storage.READ_TIMEOUT_S)),
    }
    address = settings.config.get("endpoint", "") if settings.kind != "http" else settings.bucket
    authorities = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")
    if address.startswith("http://"):
        options["allow_http"] = True
    elif authorities:
        with open(authorities, "rb") as file:
            options["root_certificate"] = file.read()
    common: dict[str, Any] = {"client_options": options, "retry_config": {"max_retries": 0}}  # retries are in `reads`
    if settings.kind == "http":
        return HTTPStore.from_url(settings.bucket, **common)
    provider = {"credential_provider": _s3_credentials(location)} if settings.renewable else {}
    return S3Store(settings.bucket, config=settings.config, **provider, **common)  # type: ignore[arg-type]
