"""A `Location`: any fsspec URL, with whole-object reads and atomic writes.

Each process has one file system instance per protocol. It is created on first use, shared by the threads of that
process, and never crosses a fork: an s3fs instance owns an event loop and sockets, and a copy of them in a child hangs
or mixes answers. A `Location` therefore holds only strings and can be pickled.

Endpoints, regions, accounts and credentials come from the usual variables and files of each cloud (`AWS_PROFILE`, ...).
"""

from __future__ import annotations

import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import fsspec

from shards.common.errors import StorageError
from shards.storage.clouds import azure, gs, s3
from shards.storage.clouds.settings import Limits
from shards.storage.explain import storage_errors
from shards.storage.local_files import atomic_write

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 8  # per packet; five attempts of `shards.storage.reads` end within a minute
S3_ATTEMPTS = 3  # of a request, by botocore
CLOUD_ATTEMPTS = 2  # by gcsfs and azure-core, which wait for longer before the next
DELETES_AT_ONCE = 16
SLOWEST_UPLOAD = 2**18  # bytes per second; a slower upload is aborted

# A remote URL without a bucket or host, which fsspec would take for a relative path.
_NOWHERE = re.compile(r"(s3a?|gc?s|az|abfss?|https?):(?!//[^/])")

_AZURE = ("az", "abfs", "abfss")
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", **dict.fromkeys(_AZURE, "adlfs")}

# By process. A forked child keeps its parent's alive, unused: their finalisers would remove the parent's sockets from
# the epoll set that both share.
_instances: dict[tuple[int, str, str, bool], Any] = {}


@dataclass(frozen=True)
class Location:
    """An object or a folder that fsspec can reach.

    Attributes:
        url: `s3://bucket/key`, `https://...`, a local path, or any other URL that fsspec knows.
        anonymous: do not sign requests to S3, Google Cloud Storage and Azure. Never guessed: set by the user or by the
            default of a public source. (gcsfs reads without credentials if it finds none.)

    Raises:
        StorageError: the URL is empty, or names no bucket or host; from the methods: the store could not be reached, or
            the object could not be read, written or removed.
    """

    url: str
    anonymous: bool = False

    def __post_init__(self) -> None:
        if not self.url:
            raise StorageError("a location is empty: give a local path or a URL such as s3://bucket/prefix")
        if nowhere := _NOWHERE.match(self.url):
            scheme = nowhere[1]
            what = "host" if scheme.startswith("http") else "container" if scheme.startswith("a") else "bucket"
            raise StorageError(f"{self.url}: it names no {what}: give {scheme}://{what}/path", permanent=True)
        object.__setattr__(self, "url", self.url.rstrip("/") or "/")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Location:
        """Return the location of a file under this one; its name is quoted where that makes it a part of a URL."""
        if self.protocol in ("http", "https"):
            name = quote(name)
        return replace(self, url=f"{self.url.rstrip('/')}/{name}")

    @property
    def protocol(self) -> str:
        """The URL's scheme; `file` for a path without one."""
        return self.url.split("://", 1)[0] if "://" in self.url else "file"

    @property
    def fs(self) -> Any:
        """This process's fsspec file system for the location."""
        key = (os.getpid(), self.protocol, azure.account_host(self.url), self.anonymous)
        if key not in _instances:  # two threads may both make one, of which one is kept
            _instances.setdefault(key, _new_filesystem(self))
        return _instances[key]

    @property
    def path(self) -> str:
        """The path by which `fs` knows the location."""
        return str(self.fs._strip_protocol(self.url))

    def sibling(self, path: str) -> Location:
        """Return the location of another path of the same store, as `fs` knows and lists it."""
        if self.protocol in _AZURE:  # the file system has several schemes, and does not know the account of the URL
            return replace(self, url=azure.url_of(path, self.url))
        return replace(self, url=str(self.fs.unstrip_protocol(path)))

    @property
    def is_local(self) -> bool:
        """Whether the location is on a disk of this machine."""
        return self.protocol in ("file", "local")

    def exists(self) -> bool:
        """Return whether there is an object or folder at this location."""
        with storage_errors(self.url):
            return bool(self.fs.exists(self.path))

    def read(self) -> bytes:
        """Return the whole object."""
        with storage_errors(self.url):
            return bytes(self.fs.cat_file(self.path))

    def write(self, data: bytes) -> None:
        """Write the whole object or nothing, by one put or, on a local disk, a temporary name and a rename."""
        with storage_errors(self.url):
            if not self.is_local:
                # botocore sends `Expect: 100-continue`, and aiohttp's read timeout does not run while it waits for the
                # answer: without a limit, a silent server would block for ever.
                limit = {"timeout": 2 * READ_TIMEOUT_S + len(data) / SLOWEST_UPLOAD} if self.fs.async_impl else {}
                self.fs.pipe_file(self.path, data, **limit)
                return
            try:
                with atomic_write(self.path) as file:
                    file.write(data)
            except FileNotFoundError as error:  # raised under /proc; it does not mean a missing object
                message = f"{self.url}: nothing can be written there: give another place"
                raise StorageError(message, permanent=True) from error

    def delete(self, *, recursive: bool = False) -> None:
        """Remove the object, or recursively a folder, if it exists.

        Some stores take S3's request that deletes many objects only with a Content-MD5, which botocore does not send:
        a single object has a request of its own, and so has every object of a folder if the request for many fails.
        """
        with storage_errors(self.url):
            if not self.fs.exists(self.path):
                return
            if not recursive:
                self.fs.rm_file(self.path)
                return
            try:
                self.fs.rm(self.path, recursive=True)
            except OSError:
                if self.is_local:
                    raise
                with ThreadPoolExecutor(DELETES_AT_ONCE) as pool:
                    list(pool.map(self.fs.rm_file, self.fs.find(self.path)))


def check_writable(folder: Location, option: str, probe: str = ".probe") -> None:
    """Raise a StorageError before hours of work if nothing can be written under a folder, which need not exist.

    On a local disk nothing is created there. Elsewhere the object `probe` is put and removed. `option` is the option
    that names the folder, for the message.
    """
    if folder.is_local:
        nearest = os.path.abspath(folder.path)
        while not os.path.lexists(nearest):  # a dangling link counts as existing
            nearest = os.path.dirname(nearest)
        try:
            tempfile.TemporaryFile(dir=nearest).close()  # os.access allows root everything, even in /proc
        except OSError as error:
            message = f"{folder}: cannot be written ({nearest} is not a writable folder): choose another {option}"
            raise StorageError(message, permanent=True) from error
        return
    try:
        (folder / probe).write(b"can this be written?")
        (folder / probe).delete()
    except StorageError as error:
        raise StorageError(f"{option} cannot be written: {error}", permanent=error.permanent) from error
    except Exception as error:  # every read-only file system raises something else
        message = f"{folder}: cannot be written ({error!r}): choose another {option}"
        raise StorageError(message, permanent=True) from error


def _new_filesystem(location: Location) -> Any:
    protocol, anonymous = location.protocol, location.anonymous
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    attempts = S3_ATTEMPTS if protocol in ("s3", "s3a") else CLOUD_ATTEMPTS
    limits = Limits(CONNECT_TIMEOUT_S, READ_TIMEOUT_S, attempts)
    try:
        with storage_errors(location.url):
            if protocol in ("s3", "s3a"):
                return s3.new_filesystem(anonymous, limits, **options)
            if protocol in ("gs", "gcs"):
                return gs.new_filesystem(anonymous, limits, **options)
            if protocol in _AZURE:
                return azure.new_filesystem(location.url, anonymous, limits, **options)
            if protocol in ("http", "https"):
                import aiohttp

                timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
                # A proxy or server that compresses on the fly would make byte ranges meaningless.
                options["client_kwargs"] = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}
            return fsspec.filesystem(protocol, **options)
    except (ValueError, ImportError) as error:
        package = _PACKAGES.get(protocol) if isinstance(error, ImportError) else None
        remedy = f": pip install {package}" if package else ""
        raise StorageError(f"{location.url}: no file system for {protocol}:// ({error}){remedy}") from error
