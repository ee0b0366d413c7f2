import contextlib
import hashlib
import io
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.fetching.fetch import Inventory, RangeFile, Refusal, Request, describe, fetch, fetch_one
from demo.s3server import S3Server
from shards.common.errors import StorageError
from shards.storage.location import Location
from shards.storage.ranges import Description


def test_what_is_missing_is_an_answer_among_the_others(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"aaaa")
    requests = [Request(Location(str(tmp_path / name))) for name in ("a", "gone", "a")]
    assert fetch(requests) == [b"aaaa", Refusal("missing"), b"aaaa"]
    assert fetch([]) == []
    with pytest.raises(StorageError, match="gone"):
        fetch_one(requests[1])


def test_a_short_answer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"aaaa")
    with pytest.raises(StorageError, match="asked for 3 bytes from 2 on, got 2"):
        fetch([Request(Location(str(tmp_path / "a")), 2, 5)])


def test_ranges_missing_keys_and_buckets_over_s3_and_http(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    s3.upload(tmp_path, bucket)
    for root in (Location(f"s3://{bucket}"), Location(f"s3://{bucket}", True), Location(f"{s3.endpoint_url}/{bucket}")):
        assert fetch([Request(root / "a", 2, 5), Request(root / "a", 0, 10)]) == [b"234", b"0123456789"]
        assert fetch([Request(root / "a"), Request(root / "b")]) == [b"0123456789", Refusal("missing")]
    with pytest.raises(StorageError, match=r"no-such-bucket.*bucket does not exist"):
        fetch([Request(Location("s3://no-such-bucket/a"))])


Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


def good(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    start, end = handler.headers.get("Range", f"bytes=0-{len(data) - 1}").removeprefix("bytes=").split("-")
    part = data[int(start) : int(end or len(data)) + 1]  # "3-" asks for the rest
    handler.send_response(206 if "Range" in handler.headers else 200)
    handler.send_header("Content-Length", str(len(part)))
    handler.end_headers()
    handler.wfile.write(part)


def status(code: int) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def dropped(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def truncated(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[:3])
    handler.close_connection = True


def without_ranges(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@contextlib.contextmanager
def faulty_server(data: bytes, answers: Sequence[Answer]) -> Iterator[tuple[Location, list[Answer]]]:
    """A real HTTP server that answers each request with the next of `answers`, and with the last from then on."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            (left.pop(0) if len(left) > 1 else left[0])(self, data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield Location(f"http://127.0.0.1:{server.server_port}/object"), left
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.storage.ranges.BACK_OFF_S", 0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", [status(503), status(500), status(429), dropped, truncated])
def test_what_may_pass_is_tried_again(fault: Answer) -> None:
    with faulty_server(b"0123456789", [fault, fault, good]) as (location, left):
        assert fetch([Request(location)]) == [b"0123456789"]
        assert left == [good]
    with faulty_server(b"0123456789", [fault, good]) as (location, _):
        assert fetch([Request(location, 2, 5)]) == [b"234"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", [status(503), dropped, truncated])
def test_what_stays_broken_is_an_error_and_never_called_missing(fault: Answer) -> None:
    with faulty_server(b"0123456789", [fault]) as (location, _):
        with pytest.raises(StorageError, match=r"object.*after several attempts"):
            fetch([Request(location)])


def test_refusals_are_answers_at_once() -> None:
    for code, reason in ((404, "missing"), (410, "missing"), (403, "refused"), (401, "refused")):
        with faulty_server(b"", [status(code), good]) as (location, left):
            assert fetch([Request(location)]) == [Refusal(reason)]
            assert left == [good]


@pytest.mark.usefixtures("quick")
def test_a_server_without_ranges_is_told_as_such() -> None:
    with faulty_server(b"0123456789", [without_ranges]) as (location, _):
        with pytest.raises(StorageError, match="ignores byte ranges"):
            fetch([Request(location, 2, 5)])


def test_objects_are_described_at_once_and_asked_about_once(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    (tmp_path / "empty").write_bytes(b"")
    s3.upload(tmp_path, bucket)
    local, remote = Location(str(tmp_path / "a.bin")), Location(f"s3://{bucket}/a.bin")
    served = Location(f"{s3.endpoint_url}/{bucket}/a.bin")
    told = describe([remote, served, Location(f"s3://{bucket}/empty"), Location(f"s3://{bucket}/none"), local])
    tag = hashlib.md5(b"0123456789").hexdigest()
    for found in told[:2]:
        assert isinstance(found, Description)
        assert (found.size, found.etag.strip('"')) == (10, tag)
    assert isinstance(told[2], Description)
    assert told[2].size == 0
    assert told[3] == Refusal("missing")
    assert isinstance(told[4], Description)
    assert (told[4].size, told[4].etag) == (10, "")
    assert told[4].changed

    inventory = Inventory()
    inventory.ask([remote, Location(f"s3://{bucket}/none")])
    remote.write(b"another")
    assert inventory.of(remote) == told[0]
    assert Inventory().of(remote).size == 7
    with pytest.raises(StorageError, match="no such object"):
        inventory.of(Location(f"s3://{bucket}/none"))


def test_a_read_bound_to_an_etag_never_brings_another_object(s3: S3Server, bucket: str) -> None:
    location = Location(f"s3://{bucket}/a.bin")
    location.write(b"0123456789")
    told = Inventory().of(location)
    assert fetch([Request(location, 2, 5, told.etag)]) == [b"234"]
    location.write(b"9876543210")
    with pytest.raises(StorageError, match="was replaced while it was being read"):
        fetch([Request(location, 2, 5, told.etag)])
    assert fetch([Request(location, 2, 5, "W/" + told.etag)]) == [b"765"]  # a weak tag binds nothing


places = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 30)))


@given(st.binary(max_size=60), places, places)
def test_range_file_reads_like_a_file(
    tmp_path_factory: pytest.TempPathFactory,
    data: bytes,
    known: list[tuple[int, int]],
    reads: list[tuple[int, int]],
) -> None:
    path = tmp_path_factory.getbasetemp() / "range-file"
    path.write_bytes(data)
    location = Location(str(path))
    parts = {start: data[start : start + length] for start, length in known}
    expected, found = io.BytesIO(data), RangeFile(location, Inventory().of(location), parts)
    for offset, length in reads:
        assert found.seek(offset) == expected.seek(offset)
        assert (found.read(length) or b"") == expected.read(length)
        assert found.tell() == expected.tell()
    assert found.seek(0, io.SEEK_END) == len(data)
    with pytest.raises(OSError):
        found.seek(-1)
