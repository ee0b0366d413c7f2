"""HTTP connections for reading S3 and http: one aiohttp session per event loop, which never crosses a fork."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import ssl
from functools import cache
from typing import Any
from urllib.request import getproxies

CONNECTIONS = 64

_sessions: dict[int, Any] = {}


def _forget() -> None:
    """In a forked child: drop the sessions of the parent's loop.

    They are kept alive, unused: closing them would change the parent's epoll set.
    """
    _inherited.append(dict(_sessions))
    _sessions.clear()


_inherited: list[dict[int, Any]] = []
os.register_at_fork(after_in_child=_forget)


async def session() -> Any:
    """Return the `aiohttp.ClientSession` of the running loop, created on first use."""
    loop = id(asyncio.get_running_loop())
    if loop not in _sessions:
        aiohttp = aiohttp_module()
        _sessions[loop] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=_certificates(_authorities())),
            auto_decompress=False,
            read_bufsize=2**18,
            trust_env=bool(getproxies()),  # otherwise aiohttp looks for a proxy in a thread, for every request
        )
        atexit.register(_close, _sessions[loop], asyncio.get_running_loop())
    return _sessions[loop]


def _close(session: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Close a session at the end of the process that created it."""
    if loop.is_running():
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(session.close(), loop).result(1)


def _authorities() -> str | None:
    return os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")


@cache
def _certificates(file: str | None) -> ssl.SSLContext:
    """Return the system's authorities, or those of a file, as botocore does."""
    return ssl.create_default_context(cafile=file)


def aiohttp_module() -> Any:
    """Import `aiohttp` on first use: it takes a tenth of a second, which --help can do without."""
    import aiohttp

    return aiohttp
