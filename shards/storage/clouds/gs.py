"""Google Cloud Storage: gcsfs, whose google-auth finds and renews credentials."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import fsspec

from shards.common.text import one_line
from shards.storage.clouds.settings import Limits, Settings, expiry, silence
from shards.storage.store_errors import TransientError

# gcsfs's own switch. By itself, its file system asks by gRPC for the kind of every bucket, which waits a minute at an
# emulator, and whose threads no fork survives. Only the zonal buckets need it.
ZONAL = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"


def new_filesystem(anonymous: bool, limits: Limits, **options: Any) -> Any:
    """Return a new file system with a token, if any credentials were found."""
    import aiohttp

    silence("gcsfs", "google.auth")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_s, sock_read=limits.read_s)
    options |= {"session_kwargs": {"timeout": timeout, "trust_env": True}}  # as obstore takes proxies
    if anonymous:
        options["token"] = "anon"
    if _zonal():
        return fsspec.filesystem("gs", **options)
    fs = _filesystem(limits.attempts)(**options)
    fs.credentials.maybe_refresh()  # now rather than with every attempt of a request
    return fs


@cache
def _filesystem(attempts: int) -> Callable[..., Any]:
    """Return gcsfs's class with another number of attempts, which is fixed in it."""
    from gcsfs.core import GCSFileSystem
    from gcsfs.retry import retry_request

    class FileSystem(GCSFileSystem):
        _request = retry_request(retries=attempts)(GCSFileSystem._request.__wrapped__)

    return FileSystem


def _zonal() -> bool:
    return os.environ.get(ZONAL, "").lower() in ("true", "1")


def settings(fs: Any, bucket: str, anonymous: bool) -> Settings | None:
    """Return what gcsfs has found: the address and the project that pays; without credentials, it reads unsigned."""
    if _zonal() or fs.version_aware or getattr(fs, "_use_client_cert", False):  # obstore presents no certificate
        return None
    address = fs.base.removesuffix("/storage/v1/")
    headers: dict[str, str] = {}
    if fs.credentials.credentials is not None:
        fs.credentials.apply(headers)
        headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    if fs.requester_pays:
        headers["x-goog-user-project"] = fs.requester_pays if isinstance(fs.requester_pays, str) else fs.project
    unsigned = fs.credentials.credentials is None
    config = {"base_url": address, "skip_signature": unsigned}
    return Settings("gs", bucket, address, config, headers, renewable=not unsigned)


def credentials(fs: Any) -> Callable[[], dict[str, Any]]:
    """Return a function that obstore calls for a token, which google-auth renews."""

    def ask() -> dict[str, Any]:
        try:
            fs.credentials.maybe_refresh()
        except Exception as error:
            raise plain_error(error) from error
        return {"token": fs.credentials.credentials.token, "expires_at": expiry()}

    return ask


def plain_error(error: Exception) -> Exception:
    """Return the standard exception for one of gcsfs or google-auth; any other as it is."""
    library, text = type(error).__module__.partition(".")[0], one_line(error)
    status = str(getattr(error, "code", "")) if library == "gcsfs" else ""
    if status == "401" and error.__cause__ is not None:  # google-auth's reason why there is no new token
        return plain_error(error.__cause__) if isinstance(error.__cause__, Exception) else error
    if status in ("401", "403") or (type(error) is OSError and text.startswith("Forbidden: ")):
        return PermissionError(text)
    if isinstance(error, FileNotFoundError) and "/upload/storage/v1/b/" in text:
        return FileNotFoundError("The specified bucket does not exist")
    if library == "google" and not getattr(error, "retryable", True):
        return PermissionError(f"the credentials could not be renewed: {text}")
    return TransientError(text) if library in ("gcsfs", "google") else error
