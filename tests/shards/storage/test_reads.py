"""Reads from servers and file systems that fail in ways that the S3 server of the other tests does not."""

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from shards.storage.location import Location
from shards.storage.reads import Read, ReadStatistics, read_many
from shards.storage.store_errors import TransientError
from tests.support import forget_connections

OBJECT = bytes(range(251)) * 200


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.common.back_off.SCALE", 0.001)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass


class OtherRegion(Handler):
    """A bucket in eu-west-1 that refuses signatures for other regions, in either of S3's two ways."""

    region_in_header = True

    def do_GET(self) -> None:
        here = "/eu-west-1/s3/" in self.headers.get("Authorization", "")
        body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>"
        body = b"0123456789" if here else b"" if self.region_in_header else body
        self.send_response(200 if here else 400)
        if self.region_in_header:
            self.send_header("x-amz-bucket-region", "eu-west-1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.mark.parametrize("region_in_header", [True, False])
def test_a_bucket_in_another_region_is_found(monkeypatch: pytest.MonkeyPatch, region_in_header: bool) -> None:
    monkeypatch.setattr(OtherRegion, "region_in_header", region_in_header)
    with serving(OtherRegion) as url:
        forget_connections(monkeypatch)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        assert read_many([Read(Location("s3://far-away/a"))] * 3) == [b"0123456789"] * 3


# Bytes sent at once, then bytes per piece, and seconds between pieces.
PACES = {"trickle": (0, 1, 0.02), "half, then a trickle": (4000, 1, 0.02)}


class Poor(Handler):
    """A server of ranges of `OBJECT` that answers as `ways` says, one request after the other, then correctly."""

    ways: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        start, last = map(int, re.findall(r"\d+", self.headers["Range"]))
        way = self.ways.pop(0) if self.ways else "whole"
        asked = OBJECT[start : last + 1]
        body = {"nothing": b"", **dict.fromkeys(["whole", *PACES], asked)}.get(way, asked[: len(asked) // 2])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(OBJECT)}")
        if way == "without a length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        at_once, piece, pause = PACES.get(way, (len(body), len(body) or 1, 0))
        with suppress(ConnectionError):  # the reader closes the connection
            for position in range(0, len(body), piece):
                self.wfile.write(body[position : position + piece])
                if position >= at_once:
                    time.sleep(pause)


@pytest.fixture
def poor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    monkeypatch.setattr(Poor, "ways", [])
    with serving(Poor) as url:
        yield Location(f"{url}/object")


def limit_time(patch: pytest.MonkeyPatch, seconds: float) -> None:
    patch.setattr("shards.storage.location.READ_TIMEOUT_S", seconds)
    patch.setattr("shards.storage.object_store.SLOWEST_BODY_S", seconds)


@pytest.mark.parametrize(
    ("ways", "timeout_s"),
    [(["short", "short"], 60), (["without a length"] * 2, 60), (["half, then a trickle", "trickle"], 0.5)],
)
def test_an_answer_that_breaks_is_continued(
    poor: Location, monkeypatch: pytest.MonkeyPatch, ways: list[str], timeout_s: float
) -> None:
    limit_time(monkeypatch, timeout_s)
    Poor.ways, done = ways, ReadStatistics()
    assert read_many([Read(poor, 1000, 9000)], statistics=done) == [OBJECT[1000:9000]]
    assert done.nbytes == 8000
    assert done.requests == done.retries + 1 >= 3  # more if the machine is busy for longer than the timeout


def test_a_range_beyond_the_end_of_the_object_is_shorter(poor: Location) -> None:
    done = ReadStatistics()
    assert read_many([Read(poor, 50_000, 60_000)], statistics=done) == [OBJECT[50_000:]]
    assert done.requests == 1


@pytest.mark.parametrize(
    ("way", "timeout_s", "message"),
    [
        ("nothing", 60, "requested bytes 1000 to 9000, got 1000 to 1000"),
        ("trickle", 0.5, "the answer took too long"),
    ],
)
def test_answers_without_a_packet_of_data_are_an_error_in_the_end(
    poor: Location, monkeypatch: pytest.MonkeyPatch, way: str, timeout_s: float, message: str
) -> None:
    limit_time(monkeypatch, timeout_s)
    Poor.ways, done = [way] * 9, ReadStatistics()
    [error] = read_many([Read(poor, 1000, 9000)], statistics=done)
    assert isinstance(error, TransientError | TimeoutError)
    assert re.fullmatch(message, str(error))
    assert done.requests == 5


class Flaky(LocalFileSystem):
    """The local disk as a file system that fails now and then."""

    protocol = "flaky"
    failures: ClassVar[list[Exception]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if self.failures:
            raise self.failures.pop()
        return super().cat_file(path.removeprefix("flaky://"), start, end, **options)


class Silent(AsyncFileSystem):
    """A file system that answers its third request."""

    protocol = "silent"
    asked = 0

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        Silent.asked += 1
        if Silent.asked < 3:
            await asyncio.Event().wait()
        return OBJECT[start:end]


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    for kind in (Flaky, Silent):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    forget_connections(monkeypatch)
    monkeypatch.setattr("shards.storage.location.READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(Flaky, "failures", [])
    monkeypatch.setattr(Silent, "asked", 0)
    (tmp_path / "object").write_bytes(OBJECT)
    return Location(f"flaky://{tmp_path}/object")


def test_any_file_system_is_retried(flaky: Location) -> None:
    Flaky.failures, done = [ConnectionResetError("by peer"), TimeoutError()], ReadStatistics()
    assert read_many([Read(flaky, 1000, 9000)], statistics=done) == [OBJECT[1000:9000]]
    assert (done.requests, done.retries, done.nbytes, done.trouble) == (3, 2, 8000, "by peer")


@pytest.mark.parametrize(
    ("error", "requests"),
    [(ConnectionResetError, 5), (TimeoutError, 5), (FileNotFoundError, 1), (PermissionError, 1), (ValueError, 1)],
)
def test_an_error_that_stays_is_the_result(flaky: Location, error: type[Exception], requests: int) -> None:
    Flaky.failures, done = [error("reason")] * 9, ReadStatistics()
    [got] = read_many([Read(flaky, 1000, 9000)], statistics=done)
    assert isinstance(got, OSError if error is TimeoutError else error)
    assert (str(got), done.requests) == ("reason", requests)


def test_a_silent_asynchronous_file_system_is_retried(flaky: Location) -> None:
    done = ReadStatistics()
    assert read_many([Read(Location("silent://a/b"), 100, 200)], statistics=done) == [OBJECT[100:200]]
    assert (done.requests, done.retries, done.trouble) == (3, 2, "no answer came in 0 s")
