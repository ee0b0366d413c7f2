"""The connections over which S3 and http are read: one aiohttp session an event loop, which never crosses a fork."""

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
    """In a forked child: sessions belong to the parent's loop. They are kept alive, unused: closing them would reach
    into the parent's epoll set."""
    _inherited.append(dict(_sessions))
    _sessions.clear()


_inherited: list[dict[int, Any]] = []
os.register_at_fork(after_in_child=_forget)


async def session() -> Any:
    """The `aiohttp.ClientSession` of the running loop, made on first use."""
    loop = id(asyncio.get_running_loop())
    if loop not in _sessions:
        aiohttp = aiohttp_module()
        _sessions[loop] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=_certificates(_authorities())),
            auto_decompress=False,
            read_bufsize=2**18,
            trust_env=bool(getproxies()),  # else aiohttp looks for a proxy in a thread, for each request anew
        )
        atexit.register(_close, _sessions[loop], asyncio.get_running_loop())
    return _sessions[loop]


def _close(session: Any, loop: asyncio.AbstractEventLoop) -> None:
    """At the end of the process, which is the one that made the session."""
    if loop.is_running():
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(session.close(), loop).result(1)


def _authorities() -> str | None:
    return os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")


@cache
def _certificates(file: str | None) -> ssl.SSLContext:
    """The system's authorities, or those of a file, which botocore would take."""
    return ssl.create_default_context(cafile=file)


def aiohttp_module() -> Any:
    """`aiohttp`, whose import takes a tenth of a second that --help can do without."""
    import aiohttp

    return aiohttp
