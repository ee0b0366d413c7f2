"""Any fsspec URL to a file system and a path.

One file system instance a process: it is made on first use, shared by the threads of that process, and never crosses a
fork (an s3fs instance owns an event loop and sockets; a copy of them in a child hangs or mixes answers). A `Location`
therefore holds only strings and may be pickled and sent anywhere.

S3 endpoints, regions and credentials come from the usual AWS variables and files (`AWS_ENDPOINT_URL`, `AWS_PROFILE`,
...), which botocore reads by itself.
"""

from __future__ import annotations

import gc
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import fsspec

from shards.common.errors import StorageError
from shards.storage.local_files import atomic_write

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 8  # for a packet; five attempts of `shards.storage.ranges`, and telling of it, end within a minute
ATTEMPTS = 3
SLOWEST_UPLOAD = 2**18  # bytes a second below which an upload is given up
PROBE = ".probe"  # what `check_writable` puts and removes

# A remote URL that names no bucket or host: without this, fsspec takes `s3:` for a folder in the current one.
_NOWHERE = re.compile(r"(s3a?|gc?s|https?):(?!//[^/])")

_instances: dict[tuple[str, bool], Any] = {}
_inherited: list[dict[tuple[str, bool], Any]] = []
_instances_lock = threading.Lock()


def _forget_instances() -> None:
    """In a forked child: the parent's instances are not ours, and its lock may have been held at that moment.

    They are kept alive, unused: their finalisers would take the sockets out of the epoll set that child and parent
    share, after which the parent waits for answers that it never hears of.
    """
    global _instances_lock
    _instances_lock = threading.Lock()
    _inherited.append(dict(_instances))
    _instances.clear()
    gc.freeze()  # nor may the collector come upon instances that the parent has dropped


os.register_at_fork(after_in_child=_forget_instances)


@dataclass(frozen=True)
class Location:
    """A place that fsspec can reach.

    Attributes:
        url: `s3://bucket/key`, `https://...`, a local path, or any other URL that fsspec knows.
        anonymous: S3 requests are not signed. Never guessed: it is set where a user or a public default says so.
    """

    url: str
    anonymous: bool = False

    def __post_init__(self) -> None:
        if not self.url:
            raise StorageError("a location is empty: give a local path or a URL such as s3://bucket/prefix")
        nowhere = _NOWHERE.match(self.url)
        if nowhere:
            scheme = nowhere[1]
            what = "host" if scheme.startswith("http") else "bucket"
            raise StorageError(f"{self.url}: it names no {what}: give {scheme}://{what}/path", permanent=True)
        object.__setattr__(self, "url", self.url.rstrip("/") or "/")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Location:
        return replace(self, url=f"{self.url.rstrip('/')}/{name}")

    @property
    def protocol(self) -> str:
        """The URL's scheme; `file` for a bare path."""
        return self.url.split("://", 1)[0] if "://" in self.url else "file"

    @property
    def fs(self) -> Any:
        """This process's fsspec file system for the location."""
        key = (self.protocol, self.anonymous)
        with _instances_lock:
            if key not in _instances:
                _instances[key] = _new_filesystem(self)
            return _instances[key]

    @property
    def path(self) -> str:
        """The path by which `fs` knows the location."""
        return str(self.fs._strip_protocol(self.url))

    @property
    def is_local(self) -> bool:
        """Whether the location is on a disk of this machine."""
        return self.protocol in ("file", "local")

    def exists(self) -> bool:
        """Whether an object lies at exactly this location.

        Raises:
            StorageError: the place could not be asked.
        """
        with storage_errors(self.url):
            return bool(self.fs.exists(self.path))

    def size(self) -> int:
        """The object's length in bytes.

        Raises:
            StorageError: there is no such object, or its length is not told.
        """
        with storage_errors(self.url):
            size = self.fs.info(self.path)["size"]
        if size is None:
            raise StorageError(f"{self.url}: the server does not tell the object's length, which range reads need")
        return int(size)

    def read(self) -> bytes:
        """The whole object.

        Raises:
            StorageError: it is missing or could not be read.
        """
        with storage_errors(self.url):
            return bytes(self.fs.cat_file(self.path))

    def write(self, data: bytes) -> None:
        """Write the whole object or nothing: one object put, or on a local disk a temporary name and a rename.

        Raises:
            StorageError: it could not be written.
        """
        with storage_errors(self.url):
            if not self.is_local:
                # botocore sends `Expect: 100-continue`, and aiohttp's read timeout does not run while it waits for that
                # answer: a silent server would hold us for ever.
                limit = {"timeout": 2 * READ_TIMEOUT_S + len(data) / SLOWEST_UPLOAD} if self.fs.async_impl else {}
                self.fs.pipe_file(self.path, data, **limit)
                return
            try:
                with atomic_write(self.path) as file:
                    file.write(data)
            except FileNotFoundError as error:  # as /proc answers; not that the object is missing
                raise StorageError(
                    f"{self.url}: nothing can be written there: give another place", permanent=True
                ) from error

    def delete(self, *, recursive: bool = False) -> None:
        """Remove the object (or, recursively, what lies below); no error where there is none."""
        with storage_errors(self.url):
            if self.fs.exists(self.path):
                self.fs.rm(self.path, recursive=recursive)


def check_writable(folder: Location, option: str, probe: str = PROBE) -> None:
    """Find out before hours of work whether files can be written below a folder. Nothing stays there.

    On a disk nothing is made that has a name, and no folder. Elsewhere only trying tells: an object is put and removed.

    Args:
        folder: need not exist.
        option: by which the user chose it.
        probe: name of that object.

    Raises:
        StorageError: nothing can be written there; elsewhere than on a disk, or nothing removed.
    """
    if folder.is_local:
        _check_local(folder, option)
        return
    try:
        (folder / probe).write(b"can this be written?")
        (folder / probe).delete()
    except StorageError as error:
        raise StorageError(f"{option} cannot be written: {error}", permanent=error.permanent) from error
    except Exception as error:  # each file system that can only be read has an answer of its own
        told = f"{folder}: cannot be written ({error!r}): choose another {option}"
        raise StorageError(told, permanent=True) from error


def _check_local(folder: Location, option: str) -> None:
    nearest = os.path.abspath(folder.path)
    while not os.path.lexists(nearest):  # a link to nowhere is in the way, too
        nearest = os.path.dirname(nearest)
    try:
        with tempfile.TemporaryFile(dir=nearest):  # os.access lets root pass everywhere, also in /proc
            pass
    except OSError as error:
        told = f"{folder}: cannot be written ({nearest} is not a writable folder): choose another {option}"
        raise StorageError(told, permanent=True) from error


def _new_filesystem(location: Location) -> Any:
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if location.protocol in ("s3", "s3a"):
        options["anon"] = location.anonymous
        options["max_concurrency"] = 1  # else s3fs asks for the length of each object before it reads it
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
            "max_pool_connections": 64,
        }
    elif location.protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        # A proxy or server that compresses on the fly would make byte ranges meaningless.
        options["client_kwargs"] = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}
    try:
        filesystem = fsspec.filesystem(location.protocol, **options)
        if location.protocol in ("s3", "s3a"):
            filesystem.retries = 1  # botocore tries again: a second layer would multiply its attempts
        return filesystem
    except (ValueError, ImportError) as error:
        raise StorageError(f"{location.url}: no file system for {location.protocol}:// ({error})") from error


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
        refused = isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"
        missing = isinstance(error, FileNotFoundError) and not no_bucket
        wrong_kind = isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError)
        permanent = refused or no_bucket or wrong_kind or _is_wrong_endpoint(error)
        raise StorageError(message, missing=missing, permanent=permanent) from error


def is_missing_bucket(error: BaseException) -> bool:
    """Whether S3 answered that the bucket, not only the key, is missing: s3fs tells the two apart by its sentence."""
    return isinstance(error, FileNotFoundError) and "bucket does not exist" in str(error).lower()


def _is_wrong_endpoint(error: BaseException) -> bool:
    """Whether botocore says so; it has no error of its own for that."""
    return isinstance(error, ValueError) and str(error).startswith("Invalid endpoint")


def explain(error: BaseException, url: str) -> str | None:
    """One line for an error that a file system raised at `url`; None when it is not an error of storage."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if kind == "NoCredentialsError":
        return (
            f"{url}: no AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE "
            "(a public bucket can be read without: --anonymous, where the command has it, or in your own loop "
            "open_dataset(Location(url, anonymous=True)))"
        )
    if _is_wrong_endpoint(error):
        return f"{url}: {text}: give http://host:port in AWS_ENDPOINT_URL"
    if kind in ("EndpointConnectionError", "ClientConnectorError", "ConnectTimeoutError", "ConnectionRefusedError"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        remedy = f"; AWS_ENDPOINT_URL is {endpoint}" if endpoint and url.startswith("s3") else ""
        return f"{url}: the endpoint cannot be reached ({text}){remedy}: check the address and the network"
    if isinstance(error, FileNotFoundError):
        if is_missing_bucket(error):
            return f"{url}: the bucket does not exist: create it, or correct the URL"
        return f"{url}: there is no such object"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{url}: {_file_above(url)} is a file, not a folder: correct the path"
    if isinstance(error, IsADirectoryError):
        return f"{url}: it is a folder, not a file: correct the path"
    if isinstance(error, PermissionError) and "://" not in url.removeprefix("file://"):
        return f"{url}: access was refused ({text}): check the permissions of the file and its folder"
    if isinstance(error, PermissionError):
        return f"{url}: access was refused ({text}): check the credentials and the bucket's policy"
    if isinstance(error, OSError | TimeoutError) or kind in ("ClientError", "BotoCoreError", "ClientPayloadError"):
        return f"{url}: {kind}: {text or 'no further reason was given'}"
    if type(error).__module__.split(".")[0] in ("aiohttp", "botocore", "aiobotocore", "s3fs"):
        return f"{url}: {kind}: {text or 'no further reason was given'}"
    return None


def _file_above(url: str) -> str:
    """The file that lies where a local path needs a folder, as far as it can be told."""
    path = url.removeprefix("file://")
    while path and not os.path.lexists(path):
        path = os.path.dirname(path)
    return path if os.path.isfile(path) else "a part of it"
