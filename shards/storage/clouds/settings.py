"""What it takes to open a store with obstore, and the limits of file systems."""

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

# botocore, google-auth and azure-identity renew credentials in good time whenever they are asked; obstore asks again
# after this time.
CREDENTIALS_TTL = timedelta(minutes=5)


@dataclass(frozen=True)
class Settings:
    """What it takes to open a store: plain values, which may cross a fork.

    Attributes:
        kind: of the store: "s3", "gs", "az" or "http".
        bucket: or container; for http the URL of the server.
        address: URL of the server; "" for the one that obstore knows.
        config: the store's configuration, by obstore's names.
        headers: sent with every request.
        renewable: credentials expire, and each process gets its own from fsspec's file system.
    """

    kind: str
    bucket: str
    address: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    renewable: bool = False


@dataclass(frozen=True)
class Limits:
    """Limits of a file system: seconds to connect, seconds between two packets, attempts of a request."""

    connect_s: float
    read_s: float
    attempts: int


def expiry() -> datetime:
    """Return when obstore should ask for credentials again."""
    return datetime.now(UTC) + CREDENTIALS_TTL


def silence(*loggers: str) -> None:
    """Keep what a library logs about errors, with tracebacks, off the terminal: it raises them as well."""
    for logger in map(logging.getLogger, loggers):
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)
