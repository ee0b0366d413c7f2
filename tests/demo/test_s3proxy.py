"""The fault-injecting proxy: a plain client sees each fault as documented, and everything else unchanged."""

import base64
import http.client
import random
import socket
import urllib.request
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from http.client import RemoteDisconnected
from typing import Any
from unittest.mock import AsyncMock, call

import pytest
import s3fs
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import EndpointConnectionError

from demo.s3proxy import Fault, S3Proxy, Seen, proxy_process
from demo.s3server import KEY, REGION, SECRET, S3Server

BODY = bytes(range(256)) * 400


@pytest.fixture(scope="module")
def stored(s3: S3Server) -> Iterator[str]:
    """A bucket with one object `BODY` at `key`."""
    s3.make_bucket("proxied")
    s3.filesystem().pipe_file("proxied/key", BODY)
    yield "proxied"
    s3.filesystem().rm("proxied", recursive=True)


@contextmanager
def connected(proxy: S3Proxy, timeout: float = 20.0) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(proxy.endpoint_url.removeprefix("http://"), timeout=timeout)
    yield connection
    connection.close()


def fetch(connection: http.client.HTTPConnection, path: str, method: str = "GET", start: int = 0) -> tuple[int, bytes]:
    """Return the status and the body of an answer; a request from a later `start` is for 10 bytes."""
    connection.request(method, f"/{path}", headers={"Range": f"bytes={start}-{start + 9}"} if start else {})
    response = connection.getresponse()
    return response.status, response.read()


def client(s3: S3Server, proxy: S3Proxy, retries: int = 5, **config: Any) -> s3fs.S3FileSystem:
    attempts = {"retries": {"total_max_attempts": 1}} if retries == 1 else {}
    files = s3.filesystem(proxy.endpoint_url, config_kwargs=config | attempts)
    files.retries = retries
    return files


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("slow_down", 503, "SlowDown"),
        ("internal_error", 500, "InternalError"),
        ("refuse", 403, "AccessDenied"),
        ("missing", 404, "NoSuchKey"),
        ("expired", 400, "ExpiredToken"),
    ],
)
def test_refusals_are_the_answers_of_s3(s3: S3Server, stored: str, kind: Any, status: int, code: str) -> None:
    arrived: list[Seen] = []
    faults = [Fault(kind, times=1)]
    with S3Proxy(s3.endpoint_url, faults, on_request=arrived.append) as proxy, connected(proxy) as http:
        found, body = fetch(http, f"{stored}/key")
        assert (found, f"<Code>{code}</Code>".encode() in body) == (status, True)
        assert fetch(http, f"{stored}/key") == (200, BODY)  # on the same connection
    assert proxy.requests == [Seen("GET", f"{stored}/key", "", status), Seen("GET", f"{stored}/key", "", 200)]
    assert arrived == [Seen("GET", f"{stored}/key", "", 0)] * 2
    assert proxy.counters.faults == {kind: 1}


@pytest.mark.parametrize(
    ("kind", "ends_with", "without_body"),
    [
        ("reset", ConnectionResetError, ConnectionResetError),
        ("truncate", None, RemoteDisconnected),
        ("stall", TimeoutError, None),
    ],
)
def test_a_broken_download_returns_part_of_the_body(
    s3: S3Server, stored: str, kind: Any, ends_with: Any, without_body: Any
) -> None:
    with S3Proxy(s3.endpoint_url, [Fault(kind, after=0.25)]) as proxy, connected(proxy) as http:
        http.request("GET", f"/{stored}/key", headers={"Range": "bytes=1000-1999"})
        response = http.getresponse()
        assert (response.status, response.headers["Content-Length"]) == (206, "1000")
        assert response.read(250) == BODY[1000:1250]
        http.sock.settimeout(0.2 if kind == "stall" else 20)  # nothing else comes
        with pytest.raises(ends_with) if ends_with else nullcontext():
            assert response.read1() == b""
        assert proxy.counters.sent == 250
        if without_body:
            http.close()
            with pytest.raises(ConnectionResetError) as caught:
                fetch(http, f"{stored}/key", "HEAD")
            assert type(caught.value) is without_body
            assert proxy.requests[-1] == Seen("HEAD", f"{stored}/key", "", 0)


def test_a_corrupt_body_has_its_length_and_one_wrong_byte(s3: S3Server, stored: str) -> None:
    with S3Proxy(s3.endpoint_url, [Fault("corrupt", after=0.1)]) as proxy, connected(proxy) as http:
        _, got = fetch(http, f"{stored}/key")
    assert [place for place in range(len(BODY)) if got[place] != BODY[place]] == [len(BODY) // 10]
    assert len(got) == len(BODY)


@pytest.mark.parametrize(
    ("kind", "size"), [("slow_down", 0), ("reset", 0), ("reset", 3 * 2**20), ("truncate", 3 * 2**20), ("stall", 2**20)]
)
def test_a_broken_upload_does_not_reach_the_store_and_is_sent_again(
    s3: S3Server, bucket: str, kind: Any, size: int
) -> None:
    data = BODY * (size // len(BODY))
    with S3Proxy(s3.endpoint_url, [Fault(kind, "PUT", times=1)]) as proxy:
        files = client(s3, proxy, read_timeout=4 if kind == "stall" else 60)
        files.pipe_file(f"{bucket}/new", data)
        assert s3.filesystem().cat_file(f"{bucket}/new") == data
    assert [seen.status for seen in proxy.requests if seen.method == "PUT"][-1] == 200
    assert proxy.counters.requests["PUT"] == 2


def test_a_lost_answer_and_a_corrupt_upload_are_errors(s3: S3Server, bucket: str) -> None:
    faults = [Fault("reset", "PUT", "lost$", after=1.0), Fault("corrupt", "PUT", "corrupt$")]
    with S3Proxy(s3.endpoint_url, faults) as proxy:
        files = client(s3, proxy, retries=1)
        with pytest.raises(EndpointConnectionError):  # botocore's name for a reset
            files.pipe_file(f"{bucket}/lost", BODY)
        with pytest.raises(OSError, match="Content-Md5"):
            files.pipe_file(f"{bucket}/corrupt", BODY)
    assert s3.filesystem().find(bucket) == [f"{bucket}/lost"]
    assert s3.filesystem().cat_file(f"{bucket}/lost") == BODY


def test_without_faults_everything_passes_unchanged(s3: S3Server, bucket: str) -> None:
    def headers(url: str) -> dict[str, str]:
        with urllib.request.urlopen(f"{url}/{bucket}/a/big", timeout=20) as response:
            changing = ("Date", "X-Amz-Request-Id")
            return {name.title(): value for name, value in response.headers.items() if name.title() not in changing}

    data = random.Random(0).randbytes(11 * 2**20)
    with S3Proxy(s3.endpoint_url) as proxy:
        files = client(s3, proxy)
        files.pipe_file(f"{bucket}/a/big", data, chunksize=5 * 2**20)
        files.pipe_file(f"{bucket}/a/ü +%&=?.txt", b"odd name")
        assert files.cat_file(f"{bucket}/a/big") == data
        assert files.cat_file(f"{bucket}/a/big", start=7_000_001, end=7_000_101) == data[7_000_001:7_000_101]
        assert sorted(files.find(bucket)) == [f"{bucket}/a/big", f"{bucket}/a/ü +%&=?.txt"]
        assert files.info(f"{bucket}/a/big") == s3.filesystem().info(f"{bucket}/a/big")
        assert headers(proxy.endpoint_url) == headers(s3.endpoint_url)
        files.rm_file(f"{bucket}/a/big")
        assert not files.exists(f"{bucket}/a/big")
    assert {seen.range for seen in proxy.requests if seen.method == "PUT"} == {"", *(f"part={n}" for n in (1, 2, 3))}
    assert Seen("GET", f"{bucket}/a/big", "bytes=7000001-7000100", 206) in proxy.requests
    assert Seen("PUT", f"{bucket}/a/ü +%&=?.txt", "", 200) in proxy.requests
    assert sum(proxy.counters.requests.values()) == len(proxy.requests)
    assert min(proxy.counters.received, proxy.counters.sent) >= len(data)


def test_aws_chunked_bodies_pass_after_100_continue(s3: S3Server, bucket: str) -> None:
    # The AWS tools upload like this: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming-trailers.html
    checksum = base64.b64encode(zlib.crc32(BODY).to_bytes(4))
    body = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\nx-amz-checksum-crc32:" + checksum + b"\r\n\r\n"
    with S3Proxy(s3.endpoint_url) as proxy, connected(proxy) as http:
        headers = {
            "Content-Encoding": "aws-chunked",
            "X-Amz-Content-SHA256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
            "X-Amz-Trailer": "x-amz-checksum-crc32",
            "X-Amz-Decoded-Content-Length": str(len(BODY)),
            "Content-Length": str(len(body)),
        }
        request = AWSRequest("PUT", f"{proxy.endpoint_url}/{bucket}/chunked", headers)
        SigV4Auth(Credentials(KEY, SECRET), "s3", REGION).add_auth(request)
        http.putrequest("PUT", f"/{bucket}/chunked")
        for name, value in {**dict(request.headers.items()), "Expect": "100-continue"}.items():
            http.putheader(name, value)
        http.endheaders()
        assert http.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        http.send(body)
        assert http.getresponse().status == 200
    assert s3.filesystem().cat_file(f"{bucket}/chunked") == BODY


def statuses(s3: S3Server, bucket: str, order: Sequence[int], threads: int, seed: int) -> dict[str, list[int]]:
    """Return the statuses of four requests for each range."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    with S3Proxy(s3.endpoint_url, [Fault("slow_down", share=0.3)], seed=seed) as proxy:

        def get(start: int) -> None:
            with connected(proxy) as http:
                for _ in range(4):
                    fetch(http, f"{bucket}/key", start=start)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(get, order))
    for seen in proxy.requests:
        found[seen.range].append(seen.status)
    return found


def test_share_depends_on_the_seed_not_on_order_or_concurrency(s3: S3Server, stored: str) -> None:
    order = range(1, 61)
    first = statuses(s3, stored, order, threads=1, seed=1)
    assert statuses(s3, stored, order[::-1], threads=8, seed=1) == first
    assert statuses(s3, stored, order, threads=1, seed=2) != first
    failed = sum(status == 503 for row in first.values() for status in row)
    assert 45 < failed < 100  # of 240; the expectation is 72, the standard deviation 7


def test_a_fault_is_matched_by_method_and_key_and_counts_times_per_key_and_hits_every_nth_request(
    s3: S3Server, stored: str
) -> None:
    s3.filesystem().pipe_file(f"{stored}/other", b"other")
    faults = [Fault("missing", "HEAD"), Fault("refuse", key="never"), Fault("slow_down", "GET", "key$|other$", times=2)]
    with S3Proxy(s3.endpoint_url, faults) as proxy, connected(proxy) as http:
        for key in ("key", "other"):
            assert [fetch(http, f"{stored}/{key}")[0] for _ in range(3)] == [503, 503, 200]
        assert fetch(http, f"{stored}/key", "HEAD")[0] == 404
        proxy.faults = ()
        assert fetch(http, f"{stored}/key", "HEAD")[0] == 200
    # A request counts for a fault if no earlier fault hit it.
    faults = [Fault("missing", "GET", every=3), Fault("refuse", "GET", every=3)]
    with S3Proxy(s3.endpoint_url, faults) as proxy, connected(proxy) as http:
        found = [fetch(http, f"{stored}/key")[0] for _ in range(9)]
    assert found == [200, 200, 404, 403, 200, 404, 200, 403, 404]


def test_latency_delays_each_request(s3: S3Server, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = AsyncMock()
    monkeypatch.setattr(S3Proxy, "_sleep", sleep)
    with S3Proxy(s3.endpoint_url, latency=0.3) as proxy, connected(proxy) as http:
        assert [fetch(http, f"{stored}/key") for _ in range(2)] == [(200, BODY)] * 2
    assert sleep.await_args_list == [call(0.3)] * 2


def test_an_unreachable_store_is_a_502(stored: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = taken.getsockname()[1]
    with S3Proxy(f"http://127.0.0.1:{nobody}") as proxy, connected(proxy) as http:
        assert fetch(http, f"{stored}/key")[0] == 502


@pytest.mark.parametrize("wrong", [{"kind": "flood"}, {"share": 1.5}, {"after": -0.1}, {"times": -1}, {"every": 0}])
def test_an_invalid_fault_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Fault"):
        Fault(**{"kind": "reset", **wrong})


def test_a_proxy_process_is_used_through_its_variables(s3: S3Server, stored: str) -> None:
    with proxy_process(s3.endpoint_url, 0.0) as environment:
        files = s3fs.S3FileSystem(endpoint_url=environment["AWS_ENDPOINT_URL"], skip_instance_cache=True)
        assert files.cat_file(f"{stored}/key") == BODY
