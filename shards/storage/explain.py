"""Errors of file systems and clients, turned into one-line messages with a remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from shards.common.errors import StorageError
from shards.common.text import one_line
from shards.storage.clouds import azure, gs

# Of botocore, aiohttp (whose failed look-ups of names are a subclass), httpx, the standard library and this package.
UNREACHABLE = frozenset(
    (
        "EndpointConnectionError",
        "ClientConnectorError",
        "ConnectError",
        "ConnectTimeout",
        "ConnectTimeoutError",
        "ConnectionRefusedError",
        "UnreachableError",
    )
)
# Libraries under fsspec's file systems, whose errors are not all of the kind OSError.
LIBRARIES = frozenset(("aiobotocore", "aiohttp", "botocore", "httpcore", "httpx", "httpx2", "s3fs"))


# By the scheme of the URL.
_CREDENTIALS = {
    "s3": "no AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "gs": "no Google credentials were found: run `gcloud auth application-default login`, or set "
    "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "no Azure credentials were found: set AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN, or log in with `az login`",
}
_ENDPOINTS = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "gs": ("STORAGE_EMULATOR_HOST",)}
_SCHEMES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}


def plain_error(error: Exception) -> Exception:
    """Return the standard exception for one of the libraries of a cloud; any other as it is."""
    return gs.plain_error(azure.plain_error(error))


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what file systems raise into a `StorageError` that names the URL and the remedy."""
    try:
        yield
    except StorageError:
        raise
    except Exception as raised:
        error = plain_error(raised)
        message = explain(error, url)
        if message is None:
            raise
        no_bucket = is_missing_bucket(error)
        missing = isinstance(error, FileNotFoundError) and not no_bucket
        permanent = isinstance(error, PermissionError | NotADirectoryError | FileExistsError | IsADirectoryError)
        permanent |= no_bucket or type(error).__name__ == "NoCredentialsError" or _is_wrong_endpoint(error)
        raise StorageError(message, missing=missing, permanent=permanent) from raised


def is_missing_bucket(error: BaseException) -> bool:
    """Return whether the store answered that the bucket, not only the key, is missing: only the message says so."""
    return isinstance(error, FileNotFoundError) and _no_bucket(error) is not None


def _no_bucket(error: BaseException) -> re.Match[str] | None:
    return re.search("(bucket|container) does not exist", str(error), re.IGNORECASE)


def is_unreachable(error: BaseException) -> bool:
    """Return whether no connection could be made."""
    return not UNREACHABLE.isdisjoint(one.__name__ for one in type(error).__mro__)


def library_of(error: BaseException) -> str:
    """Return the top-level package that defines the error's class."""
    return type(error).__module__.split(".")[0]


def explain(error: BaseException, url: str) -> str | None:
    """Return one line about an error that a file system raised at `url`; None if it is not an error of storage."""
    error = plain_error(error) if isinstance(error, Exception) else error
    kind, text, scheme = type(error).__name__, one_line(error), url.partition("://")[0]
    scheme = _SCHEMES.get(scheme, scheme)
    if kind == "NoCredentialsError":
        return (
            f"{url}: {_CREDENTIALS[scheme]} (a public bucket can be read without: --anonymous, where the command has "
            "it, or in your own loop open_dataset(Location(url, anonymous=True)))"
        )
    if _is_wrong_endpoint(error):
        return f"{url}: {text}: give http://host:port in AWS_ENDPOINT_URL"
    if is_unreachable(error):
        names = [name for name in _ENDPOINTS.get(scheme, ()) if os.environ.get(name)]
        remedy = f"; {names[0]} is {os.environ[names[0]]}" if names else ""
        return f"{url}: the endpoint cannot be reached ({text}){remedy}: check the address and the network"
    if isinstance(error, FileNotFoundError) and (bucket := _no_bucket(error)):
        return f"{url}: the {bucket[1].lower()} does not exist: create it, or correct the URL"
    if isinstance(error, FileNotFoundError):
        return f"{url}: there is no such object"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{url}: {_file_above(url)} is a file, not a folder: correct the path"
    if isinstance(error, IsADirectoryError):
        return f"{url}: it is a folder, not a file: correct the path"
    if isinstance(error, PermissionError) and "://" not in url.removeprefix("file://"):
        return f"{url}: access was refused ({text}): check the permissions of the file and its folder"
    if isinstance(error, PermissionError) and "Anonymous caller" in text:  # Google's answer to an unsigned request
        return f"{url}: access was refused ({text}): {_CREDENTIALS['gs']}"
    if isinstance(error, PermissionError):
        return f"{url}: access was refused ({text}): check the credentials and the bucket's policy"
    if isinstance(error, OSError | TimeoutError) or library_of(error) in LIBRARIES:
        return f"{url}: {kind}: {text or 'no further reason was given'}"
    return None


def _is_wrong_endpoint(error: BaseException) -> bool:
    """Return whether botocore rejects the endpoint's URL; it has no error class for that."""
    return isinstance(error, ValueError) and str(error).startswith("Invalid endpoint")


def _file_above(url: str) -> str:
    """Return the file that is where a local path needs a folder, if it can be found."""
    path = url.removeprefix("file://")
    while path and not os.path.lexists(path):
        path = os.path.dirname(path)
    return path if os.path.isfile(path) else "a part of it"
