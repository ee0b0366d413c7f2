import contextlib
import hashlib
import io
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.fetching.fetch import Inventory, RangeFile, Refusal, Request, describe, fetch, fetch_one
from builder.fetching.traffic import Meter, Traffic
from demo.s3proxy import Fault, Kind, S3Proxy
from demo.s3server import S3Server
from shards.common.errors import StorageError
from shards.storage.location import Location
from tests.support import Proxied

DATA = b"0123456789"


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.common.back_off.SCALE", 0.01)


@pytest.fixture(scope="module")
def stored(s3: S3Server) -> Location:
    """`DATA` in a bucket of its own. Read only."""
    bucket = f"fetch-{uuid.uuid4().hex[:12]}"
    s3.make_bucket(bucket)
    s3.filesystem().pipe_file(f"{bucket}/data", DATA)
    return Location(f"s3://{bucket}/data")


@pytest.fixture
def proxy(stored: Location, proxied: Proxied) -> Iterator[S3Proxy]:
    """A proxy that requests to `stored` pass through."""
    with proxied() as running:
        yield running


def test_missing_objects_are_answers_in_the_order_of_the_requests(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"aaaa")
    requests = [Request(Location(str(tmp_path / name))) for name in ("a", "gone", "a")]
    assert fetch(requests) == [b"aaaa", Refusal("missing"), b"aaaa"]
    assert fetch([]) == []
    with pytest.raises(StorageError, match="gone"):
        fetch_one(requests[1])
    with pytest.raises(StorageError, match="expected 3 bytes from byte 2, got 2: is it truncated"):
        fetch([Request(requests[0].location, 2, 5)])


def test_fetch_reads_objects_and_ranges_over_s3_and_http(s3: S3Server, stored: Location) -> None:
    key = stored.url.removeprefix("s3://")
    for location in (stored, Location(stored.url, anonymous=True), Location(f"{s3.endpoint_url}/{key}")):
        missing = Request(Location(f"{location}-none", location.anonymous))
        requests = [Request(location, 2, 5), Request(location, 0, 10), Request(location), missing]
        assert fetch(requests) == [b"234", DATA, DATA, Refusal("missing")]
    with pytest.raises(StorageError, match=r"no-such-bucket.*bucket does not exist"):
        fetch([Request(Location("s3://no-such-bucket/a"))])


@contextlib.contextmanager
def http_server(*codes: int) -> Iterator[tuple[Location, list[int]]]:
    """A server that answers with one status after the other, always with all of `DATA`, and the list of those left."""
    left = list(codes)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(left.pop(0))
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA)

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


@pytest.mark.parametrize("kind", ["slow_down", "internal_error", "reset", "truncate"])
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_temporary_failures_are_retried_and_in_the_end_an_error(
    proxy: S3Proxy, stored: Location, kind: Kind, scheme: str
) -> None:
    location = stored if scheme == "s3" else Location(f"{proxy.endpoint_url}/{stored.url[5:]}")
    proxy.faults = (Fault(kind, "GET", times=2),)
    assert fetch([Request(location)]) == [DATA]
    assert proxy.counters.requests["GET"] == 3
    proxy.faults = (Fault(kind, "GET", after=0.0),)
    with pytest.raises(StorageError, match=r"data.*after several attempts"):
        fetch([Request(location, 2, 5)])


@pytest.mark.parametrize(
    ("codes", "answer"),
    [
        ((404, 200), Refusal("missing")),
        ((410, 200), Refusal("missing")),
        ((403, 200), Refusal("refused")),
        ((401, 200), Refusal("refused")),
        ((429, 429, 200, 200), DATA),
    ],
)
def test_refusals_of_web_servers_are_not_retried_and_other_statuses_are(
    codes: tuple[int, ...], answer: bytes | Refusal
) -> None:
    with http_server(*codes) as (location, left):
        assert fetch([Request(location)]) == [answer]
        assert left == [200]


@pytest.mark.parametrize("code", [200, 206])
def test_a_server_without_byte_ranges_is_an_error(code: int) -> None:
    with http_server(*[code] * 9) as (location, _), pytest.raises(StorageError, match=r"ignores? byte ranges"):
        fetch([Request(location, 2, 5)])


def test_an_object_costs_one_request_and_another_one_if_its_checksum_is_wrong(proxy: S3Proxy, stored: Location) -> None:
    meter = Meter()
    assert fetch([Request(stored)] * 3, meter) == [DATA] * 3
    assert proxy.counters.requests == {"GET": 3}
    assert meter.total == Traffic(3, 30)
    proxy.faults = (Fault("corrupt", "GET", times=1),)
    assert fetch([Request(stored)]) == [DATA]
    assert proxy.counters.requests["GET"] == 5
    proxy.faults = (Fault("corrupt", "GET"),)
    assert fetch([Request(stored)]) == [Refusal("undecodable")]
    with pytest.raises(StorageError, match="did not match the store's checksum"):
        fetch_one(Request(stored))


def test_an_etag_that_twice_differs_from_the_same_md5_is_no_md5(
    proxy: S3Proxy, stored: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.storage.reads._etag_is_md5", {})
    proxy.faults = (Fault("corrupt", "GET"),)
    other = bytes([*DATA[:5], DATA[5] ^ 0xFF, *DATA[6:]])
    assert fetch([Request(stored)]) == [other]
    assert proxy.counters.requests["GET"] == 2
    assert fetch([Request(stored)]) == [other]
    assert proxy.counters.requests["GET"] == 3  # it is the same for all objects of a bucket


def test_expired_credentials_are_an_error_and_denied_access_and_large_objects_are_answers(
    proxy: S3Proxy, stored: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.faults = (Fault("expired", "GET"),)
    with pytest.raises(StorageError, match=r"ExpiredToken.*check the credentials"):
        fetch([Request(stored)])
    proxy.faults = (Fault("refuse", "GET"),)
    assert fetch([Request(stored)]) == [Refusal("refused")]
    with pytest.raises(StorageError, match="access was refused: check the credentials"):
        fetch_one(Request(stored))
    proxy.faults = ()
    monkeypatch.setattr("builder.fetching.fetch.OBJECT_BYTES", 9)
    assert fetch([Request(stored)]) == [Refusal("too-large")]
    assert fetch_one(Request(stored)) == DATA  # an annotation file may be larger than an image
    monkeypatch.setattr("builder.fetching.fetch.FILE_BYTES", 9)
    with pytest.raises(StorageError, match="has more than 0 MiB, the limit"):
        fetch_one(Request(stored))


def test_describe_and_inventory(s3: S3Server, stored: Location, tmp_path: Path) -> None:
    local, remote = Location(str(tmp_path / "a")), Location(f"{stored}-a")
    empty, missing = Location(f"{stored}-empty"), Location(f"{stored}-none")
    for location, data in ((local, DATA), (remote, DATA), (empty, b"")):
        location.write(data)
    found: Any = describe([remote, Location(f"{s3.endpoint_url}/{remote.url[5:]}"), empty, local, missing])
    assert [description.size for description in found[:4]] == [10, 10, 0, 10]
    tag = hashlib.md5(DATA).hexdigest()
    assert [description.etag.strip('"') for description in (found[0], found[1], found[3])] == [tag, tag, ""]
    assert found[3].changed
    assert found[4] == Refusal("missing")

    inventory = Inventory()
    inventory.load([remote, missing])
    remote.write(b"another")
    assert inventory.of(remote) == found[0]
    assert Inventory().of(remote).size == 7
    with pytest.raises(StorageError, match="was replaced while it was being read"):
        fetch([Request(remote, 2, 5, found[0].etag)])
    assert fetch([Request(remote, 2, 5, f"W/{found[0].etag}")]) == [b"oth"]  # a weak ETag binds nothing
    with pytest.raises(StorageError, match="no such object"):
        inventory.of(missing)


@given(
    st.binary(max_size=60),
    st.integers(-70, 70),
    st.integers(0, 30),
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 30))),
)
def test_range_file_reads_like_a_file(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: int, nbytes: int, reads: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "range-file"
    path.write_bytes(data)
    location = Location(str(path))
    expected, found = io.BytesIO(data), RangeFile(location, Inventory().of(location), start, nbytes)
    for offset, length in reads:
        assert found.seek(offset) == expected.seek(offset)
        assert (found.read(length) or b"") == expected.read(length)
        assert found.seek(0, io.SEEK_CUR) == expected.seek(0, io.SEEK_CUR)
    assert found.seek(0, io.SEEK_END) == len(data)
    with pytest.raises(OSError):
        found.seek(-1)
