"""Work at the target that is tried again: a store that is busy for a moment must not end a build."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from shards.common.errors import StorageError
from shards.storage.location import Location

ATTEMPTS = 6
BACK_OFF_S = 0.5  # before the second attempt; doubled each time up to
LONGEST_S = 4.0  # so about 12 s in all, beside the retries of the file system itself

T = TypeVar("T")

logger = logging.getLogger(__name__)


def retrying(action: Callable[[], T]) -> T:
    """Do something idempotent at a store until it succeeds, `ATTEMPTS` times at most, with back-off and jitter.

    Raises:
        StorageError: it cannot succeed (no such bucket, access refused), or still failed at the last attempt.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except StorageError as error:
            if error.permanent or attempt == ATTEMPTS:
                raise
            logger.debug("%s; attempt %d of %d, again soon", error, attempt, ATTEMPTS)
        # Jitter keeps many workers from coming back at the same moment; it decides no byte of the result.
        time.sleep(min(BACK_OFF_S * 2 ** (attempt - 1), LONGEST_S) * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def write(location: Location, data: bytes) -> None:
    """`Location.write`, tried again.

    Raises:
        StorageError: see `retrying`.
    """
    retrying(lambda: location.write(data))


def delete(location: Location, *, recursive: bool = False) -> None:
    """`Location.delete`, tried again.

    Raises:
        StorageError: see `retrying`.
    """
    retrying(lambda: location.delete(recursive=recursive))
