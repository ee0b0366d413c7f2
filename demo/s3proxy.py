"""A reverse proxy on loopback in front of an S3 server: it adds latency, injects faults, and counts requests.

    with S3Server() as server, S3Proxy(server.endpoint_url, [Fault("slow_down", share=0.1)]) as proxy:
        subprocess.run(command, env={**os.environ, **proxy.environment()})

`python -m demo.s3proxy --upstream URL --latency 0.03` runs one in a separate process, for benchmarks. On two cores it
transfers about 500 MB/s or 1400 small requests per second.
"""

import argparse
import asyncio
import contextlib
import ctypes
import hashlib
import math
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from demo.s3faults import Fault as Fault
from demo.s3faults import Kind as Kind
from demo.s3faults import Seen as Seen
from demo.s3server import KEY, REGION, SECRET

# Kind -> status, code and message, as https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html has them.
_ANSWERS: dict[str, tuple[int, str, str]] = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "An internal error occurred. Try again."),
    "refuse": (403, "AccessDenied", "Access Denied"),
    "missing": (404, "NoSuchKey", "The specified key does not exist."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}
# Headers of a single connection (RFC 9110, 7.6.1). All others pass unchanged: SigV4 signs them, including Host.
_HOP_BY_HOP = (hdrs.CONNECTION, hdrs.KEEP_ALIVE, hdrs.TRANSFER_ENCODING, hdrs.EXPECT)
_ADDED_BY_AIOHTTP = (hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE)


@dataclass
class Counters:
    """Running totals.

    Attributes:
        requests: by method.
        received, sent: bytes of bodies, from and to the clients.
        faults: injected ones, by kind.
    """

    requests: Counter[str] = field(default_factory=Counter)
    received: int = 0
    sent: int = 0
    faults: Counter[str] = field(default_factory=Counter)


class S3Proxy:
    """A proxy for one `with` block, in its own thread. Signed requests stay valid: Host passes unchanged.

    Args:
        upstream_url: the server's `http://host:port`.
        faults: the first one that applies to a request is injected. The attribute may be replaced at any time.
        latency: delay of each request in seconds; other requests are not delayed.
        seed: of the choice of requests by `Fault.share`.
        on_request: called in the proxy's thread with each request when it arrives, before anything else.

    Attributes:
        counters: running totals.
        requests: every finished request, in the order of completion.
    """

    def __init__(
        self,
        upstream_url: str,
        faults: Sequence[Fault] = (),
        latency: float = 0.0,
        *,
        seed: int = 0,
        on_request: Callable[[Seen], None] | None = None,
    ) -> None:
        self.faults = tuple(faults)
        self.counters = Counters()
        self.requests: list[Seen] = []
        self._upstream = upstream_url.rstrip("/")
        self._latency = latency
        self._seed = seed
        self._on_request = on_request
        self._times_seen: Counter[Seen] = Counter()
        self._times_hit: Counter[tuple[Fault, str]] = Counter()
        self._times_matched: Counter[Fault] = Counter()
        self._thread: threading.Thread | None = None

    _sleep = staticmethod(asyncio.sleep)  # tests replace it

    def __enter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._port = listener.getsockname()[1]
        self._loop, self._stopped = asyncio.new_event_loop(), asyncio.Event()
        serve = self._serve(listener)
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serve,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the remaining connections, and stop."""
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        self._loop.close()
        self._thread = None

    @property
    def endpoint_url(self) -> str:
        """The address `http://127.0.0.1:<port>`."""
        if self._thread is None:
            raise RuntimeError("S3Proxy: it is not running; use it in a with block")
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        """Return the variables that point S3 clients at this proxy, with the credentials of `S3Server`."""
        region = dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), REGION)
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        } | region

    async def _serve(self, listener: socket.socket) -> None:
        # Cancellation: the request to the store ends with its client.
        server = web.Server(self._handle, handler_cancellation=True, access_log=None, auto_decompress=False)
        runner = web.ServerRunner(server, shutdown_timeout=1)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_ADDED_BY_AIOHTTP,
            auto_decompress=False,
            read_bufsize=2**20,
        ) as self._client:
            await runner.setup()
            await web.SockSite(runner, listener).start()
            await self._stopped.wait()
            await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        seen = _seen(request)
        self.counters.requests[seen.method] += 1
        response = web.StreamResponse()
        try:
            if self._on_request is not None:
                self._on_request(seen)
            fault = self._draw(seen)
            await self._sleep(self._latency)
            if fault is None:
                await self._pass(request, response)
            elif fault.kind in _ANSWERS:
                await self._answer(request, response, fault)
            else:
                await self._break(request, response, fault)
        except aiohttp.ClientConnectorError as error:
            response = web.Response(status=502, text=str(error))
        except ConnectionError:
            pass  # the client closed the connection
        finally:
            self.requests.append(seen._replace(status=response.status if response.prepared else 0))
        return response

    def _draw(self, seen: Seen) -> Fault | None:
        """Return the fault to inject into this request, and count it."""
        again = self._times_seen[seen]
        self._times_seen[seen] += 1
        for fault in self.faults:
            matches = re.fullmatch(fault.method, seen.method) and re.search(fault.key, seen.key)
            if not matches or self._times_hit[fault, seen.key] == fault.times:
                continue
            self._times_matched[fault] += 1
            if self._times_matched[fault] % fault.every:
                continue
            if fault.share < 1:
                drawn = hashlib.blake2b(repr((self._seed, fault.kind, *seen, again)).encode(), digest_size=8)
                if int.from_bytes(drawn.digest()) >= fault.share * 2**64:
                    continue
            self._times_hit[fault, seen.key] += 1
            self.counters.faults[fault.kind] += 1
            return fault
        return None

    async def _pass(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        async with self._ask(request, self._upload(request) if request.body_exists else None) as reply:
            _copy_head(reply, response)
            await response.prepare(request)
            async for chunk in reply.content.iter_any():
                self.counters.sent += len(chunk)
                await response.write(chunk)

    async def _answer(self, request: web.BaseRequest, response: web.StreamResponse, fault: Fault) -> None:
        status, code, message = _ANSWERS[fault.kind]
        response.set_status(status)
        response.content_type = "application/xml"
        if request.body_exists:  # like S3, which does not wait for a body that it rejects
            response.force_close()
        await response.prepare(request)
        if request.method != hdrs.METH_HEAD:
            await response.write(f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

    async def _break(self, request: web.BaseRequest, response: web.StreamResponse, fault: Fault) -> None:
        upload: bytes | None = None
        uploads = request.method in (hdrs.METH_PUT, hdrs.METH_POST)
        if uploads:
            upload = await self._broken_upload(request, fault)
            if upload is None:
                return await self._hang_up(request, fault)
        async with self._ask(request, upload) as reply:
            _copy_head(reply, response)
            body = await reply.read()
        if fault.kind == "corrupt":
            passed = body if uploads else _inverted(body, fault)
        elif body and not uploads:
            response.content_length, passed = len(body), body[: _cut(body, fault)]
        else:
            return await self._hang_up(request, fault)
        await response.prepare(request)
        # Nothing may stay in the write buffer: a reset would discard it.
        request.transport.set_write_buffer_limits(0)
        await response.write(passed)
        self.counters.sent += len(passed)
        if fault.kind != "corrupt":
            await request.writer.drain()
            await self._hang_up(request, fault)

    async def _broken_upload(self, request: web.BaseRequest, fault: Fault) -> bytes | None:
        """Return the part of an upload that reaches the store; None for nothing."""
        body = bytearray()
        if fault.after == 0 and fault.kind != "corrupt":
            return None
        async for chunk in self._upload(request):
            body += chunk
            if fault.kind == "reset" and len(body) > fault.after * (request.content_length or math.inf):
                return None
        if fault.kind == "corrupt":
            return _inverted(body, fault)
        return bytes(body) if fault.after == 1 else None

    async def _hang_up(self, request: web.BaseRequest, fault: Fault) -> None:
        """End the connection after what the client has received so far."""
        if fault.kind == "stall":
            await self._stopped.wait()  # a client that gives up earlier cancels this task
        if request.transport is None:
            return
        if fault.kind == "reset":
            # SO_LINGER of 0 seconds: close() sends RST (socket(7)).
            connection = request.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.transport.abort()
        else:
            request.transport.close()

    def _ask(self, request: web.BaseRequest, body: AsyncIterator[bytes] | bytes | None) -> Any:
        """Return the store's answer as an async context manager."""
        url = URL(self._upstream + request.raw_path, encoded=True)
        headers = _end_to_end(request.headers)
        return self._client.request(request.method, url, headers=headers, data=body, allow_redirects=False)

    async def _upload(self, request: web.BaseRequest) -> AsyncIterator[bytes]:
        if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        async for chunk in request.content.iter_any():
            self.counters.received += len(chunk)
            yield chunk


def _seen(request: web.BaseRequest) -> Seen:
    part = request.query.get("partNumber")
    place = f"part={part}" if part else request.headers.get(hdrs.RANGE, "")
    return Seen(request.method, request.path.lstrip("/"), place)


def _copy_head(reply: aiohttp.ClientResponse, response: web.StreamResponse) -> None:
    response.set_status(reply.status, reply.reason)
    response.headers.extend(_end_to_end(reply.headers))


def _end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
    kept = CIMultiDict(headers)
    for name in _HOP_BY_HOP:
        kept.popall(name, None)
    return kept


def _cut(body: bytes | bytearray, fault: Fault) -> int:
    """Return how many bytes pass unchanged: never all of them."""
    return max(0, min(int(len(body) * fault.after), len(body) - 1))


def _inverted(body: bytes | bytearray, fault: Fault) -> bytes:
    place = _cut(body, fault)
    return bytes(body[:place]) + bytes(byte ^ 0xFF for byte in body[place : place + 1]) + bytes(body[place + 1 :])


@contextlib.contextmanager
def proxy_process(upstream_url: str, latency: float = 0.03) -> Iterator[dict[str, str]]:
    """Run a proxy without faults in a separate process for one `with` block, and yield its `environment()`.

    Start it from the main thread: on Linux it is killed together with the thread that started it.

    Raises:
        RuntimeError: it could not be started.
    """
    command = [sys.executable, "-m", "demo.s3proxy", "--upstream", upstream_url, "--latency", str(latency)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(5)]
            if not all(line.startswith("export ") for line in lines):
                raise RuntimeError(f"proxy_process: {' '.join(command)} did not start; run it by hand to see why")
            yield dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
        finally:
            process.terminate()


def main(arguments: list[str] | None = None) -> int:
    """`python -m demo.s3proxy`: run in the foreground until Ctrl-C, or until the parent process ends (Linux)."""
    parser = argparse.ArgumentParser(prog="python -m demo.s3proxy", description="A proxy that adds latency to S3.")
    parser.add_argument("--upstream", required=True, metavar="URL", help="of the S3 server: http://host:port")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds per request (default: %(default)s)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of prctl(2)
    with contextlib.suppress(KeyboardInterrupt), S3Proxy(options.upstream, latency=options.latency) as proxy:
        for name, value in proxy.environment().items():
            print(f"export {name}={value}")
        print(f"# {proxy.endpoint_url} stands for {options.upstream} until Ctrl-C", flush=True)
        while True:
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
