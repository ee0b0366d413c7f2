"""Reads of S3 that the server of the other tests cannot show."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shards.ranges import Read, read_many
from shards.storage import Location


class Elsewhere(BaseHTTPRequestHandler):
    """A bucket in eu-west-1: a request that is signed for another region is told so, in S3's two ways."""

    protocol_version = "HTTP/1.1"
    told_in_header = True

    def do_GET(self) -> None:
        here = "/eu-west-1/s3/" in self.headers.get("Authorization", "")
        body = (
            b"0123456789"
            if here
            else b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>"
        )
        self.send_response(200 if here else 400)
        if not here and self.told_in_header:
            body = b""
            self.send_header("x-amz-bucket-region", "eu-west-1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("told_in_header", [True, False])
def test_a_bucket_in_another_region_is_found(monkeypatch: pytest.MonkeyPatch, told_in_header: bool) -> None:
    monkeypatch.setattr("shards.ranges.BACK_OFF_S", 0.01)
    monkeypatch.setattr(Elsewhere, "told_in_header", told_in_header)
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        assert read_many([Read(Location("s3://far-away/a"))] * 3) == [b"0123456789"] * 3
        server.shutdown()
        thread.join()
