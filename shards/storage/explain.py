"""Errors of file systems and clients, turned into one-line messages with a remedy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from shards.common.errors import StorageError
from shards.common.text import one_line

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
LIBRARIES = frozenset(
    ("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpcore", "httpx", "httpx2", "s3fs")
)


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what file systems raise into a `StorageError` that names the URL and the remedy."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        message = explain(error, url)
        if message is None:
            raise
        no_bucket = is_missing_bucket(error)
        missing = isinstance(error, FileNotFoundError) and not no_bucket
        permanent = isinstance(error, PermissionError | NotADirectoryError | FileExistsError | IsADirectoryError)
        permanent |= no_bucket or type(error).__name__ == "NoCredentialsError" or _is_wrong_endpoint(error)
        raise StorageError(message, missing=missing, permanent=permanent) from error


def is_missing_bucket(error: BaseException) -> bool:
    """Return whether S3 answered that the bucket, not only the key, is missing: s3fs says so in its message alone."""
    return isinstance(error, FileNotFoundError) and "bucket does not exist" in str(error).lower()


def is_unreachable(error: BaseException) -> bool:
    """Return whether no connection could be made."""
    return not UNREACHABLE.isdisjoint(one.__name__ for one in type(error).__mro__)


def library_of(error: BaseException) -> str:
    """Return the top-level package that defines the error's class."""
    return type(error).__module__.split(".")[0]


def explain(error: BaseException, url: str) -> str | None:
    """Return one line about an error that a file system raised at `url`; None if it is not an error of storage."""
    kind, text = type(error).__name__, one_line(error)
    if kind == "NoCredentialsError":
        return (
            f"{url}: no AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE "
            "(a public bucket can be read without: --anonymous, where the command has it, or in your own loop "
            "open_dataset(Location(url, anonymous=True)))"
        )
    if _is_wrong_endpoint(error):
        return f"{url}: {text}: give http://host:port in AWS_ENDPOINT_URL"
    if is_unreachable(error):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        remedy = f"; AWS_ENDPOINT_URL is {endpoint}" if endpoint and url.startswith("s3") else ""
        return f"{url}: the endpoint cannot be reached ({text}){remedy}: check the address and the network"
    if is_missing_bucket(error):
        return f"{url}: the bucket does not exist: create it, or correct the URL"
    if isinstance(error, FileNotFoundError):
        return f"{url}: there is no such object"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{url}: {_file_above(url)} is a file, not a folder: correct the path"
    if isinstance(error, IsADirectoryError):
        return f"{url}: it is a folder, not a file: correct the path"
    if isinstance(error, PermissionError) and "://" not in url.removeprefix("file://"):
        return f"{url}: access was refused ({text}): check the permissions of the file and its folder"
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
