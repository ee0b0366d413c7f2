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
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from shards.storage import location as storage
from shards.storage.clouds import azure, gs, s3
from shards.storage.clouds.settings import Settings
from shards.storage.location import Location
from shards.storage.store_errors import as_os_error

log = logging.getLogger(__name__)

SLOWEST_BODY_S = 30  # an answer is cut off after this time, and continued if it brought `PROGRESS` bytes


class Opened(NamedTuple):
    """An object: its store, its path there, and the settings of the store."""

    store: Any
    path: str
    settings: Settings


class _Cloud(Protocol):
    """What a module of `shards.storage.clouds` has."""

    def settings(self, fs: Any, bucket: str, anonymous: bool) -> Settings | None: ...
    def credentials(self, fs: Any) -> Callable[[], dict[str, Any]]: ...


_CLOUDS: dict[str, _Cloud] = {"s3": s3, "gs": gs, "az": azure}
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}

_Root = tuple[str, str, bool]  # protocol, bucket or host, anonymous
_settings: dict[_Root, Settings | None] = {}
_stores: dict[tuple[int, _Root], tuple[Any, Settings]] = {}  # by process: a forked child does not use its parent's
_user: int | None = None  # the process that first used obstore, of this one and those it was forked from


def open_object(location: Location) -> Opened | None:
    """Return an object's store; None if it is read through fsspec.

    Raises:
        Exception: fsspec's file system's, if settings or credentials are missing or wrong.
    """
    split, settings = _split(location), find_settings(location)
    if split is None or settings is None or not _usable():
        return None
    root, path = split
    key = (os.getpid(), root)
    if (opened := _stores.get(key)) is None:
        with _lock(os.getpid()):
            if (opened := _stores.get(key)) is None:
                settings = _settings[root] or settings  # another thread may have found another region
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
        with _lock(os.getpid()):  # the first reads of a process all start at the same moment
            if root not in _settings:
                _settings[root] = _found(root, location)
    return _settings[root]


def _found(root: _Root, location: Location) -> Settings | None:
    protocol, bucket, anonymous = root
    if protocol in ("http", "https"):
        return Settings("http", bucket, bucket)
    return _CLOUDS[protocol].settings(location.fs, bucket, anonymous)


def move_to_region(opened: Opened, location: Location, region: str) -> bool:
    """Use the region of a bucket of S3 (if "", ask S3 for it) from now on; False if `opened` has used that already."""
    settings, (root, _) = opened.settings, _split(location) or (None, "")
    region = region or (s3.region_of(location.fs, settings.bucket) if settings.kind == "s3" else "")
    if root is None or region in ("", settings.config.get("region")):
        return False
    now = _settings[root]
    if now is not None and now.config["region"] != region:  # another thread has not done it
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
    if protocol not in _CLOUDS and protocol not in ("http", "https"):
        return None
    if protocol not in _CLOUDS:
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


def _new_store(settings: Settings, location: Location) -> Any:
    from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=storage.CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=storage.READ_TIMEOUT_S),
        "timeout": timedelta(seconds=max(SLOWEST_BODY_S, storage.READ_TIMEOUT_S)),
    }
    authorities = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")
    if settings.address.startswith("http://"):
        options["allow_http"] = True
    elif authorities:
        with open(authorities, "rb") as file:
            options["root_certificate"] = file.read()
    if settings.headers:
        options["default_headers"] = settings.headers
    common: dict[str, Any] = {"client_options": options, "retry_config": {"max_retries": 0}}  # retries are in `reads`
    if settings.kind == "http":
        return HTTPStore.from_url(settings.address, **common)
    if settings.renewable:
        common["credential_provider"] = _CLOUDS[settings.kind].credentials(location.fs)
    elif settings.kind == "gs":  # otherwise obstore reads the files that google-auth has not chosen, and may fail
        common["credential_provider"] = lambda: {"token": "", "expires_at": None}
    stores: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    try:
        return stores[settings.kind](settings.bucket, config=settings.config, **common)
    except Exception as error:
        raise as_os_error(error, location.url) from error
