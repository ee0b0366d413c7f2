"""Writes and deletions that are retried: a store that is busy for a moment must not end hours of work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from shards.common.back_off import attempts
from shards.common.errors import StorageError
from shards.storage.location import Location

ATTEMPTS = 6
FIRST_DELAY_S = 0.5  # about 12 s in all, in addition to the retries of the file system itself

T = TypeVar("T")

logger = logging.getLogger(__name__)


def retrying(action: Callable[[], T]) -> T:
    """Do something idempotent at a store until it succeeds, at most `ATTEMPTS` times, and return its result.

    Raises:
        StorageError: it cannot succeed (no such bucket, access refused), or the last attempt failed.
    """
    for attempt in attempts(ATTEMPTS, FIRST_DELAY_S):
        try:
            return action()
        except StorageError as error:
            if error.permanent or attempt == ATTEMPTS:
                raise
            logger.debug("%s; attempt %d of %d failed", error, attempt, ATTEMPTS)
    raise AssertionError("unreachable")


def write(location: Location, data: bytes) -> None:
    """Call `Location.write` with retries.

    Raises:
        StorageError: see `retrying`.
    """
    retrying(lambda: location.write(data))


def delete(location: Location, *, recursive: bool = False) -> None:
    """Call `Location.delete` with retries.

    Raises:
        StorageError: see `retrying`.
    """
    retrying(lambda: location.delete(recursive=recursive))
