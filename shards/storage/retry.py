"""Writes and deletions that are retried: a store that is busy for a moment must not end hours of work."""

import logging
import os
from collections.abc import Callable
from typing import TypeVar

from shards.common.back_off import attempts
from shards.common.errors import StorageError
from shards.storage.explain import storage_errors
from shards.storage.location import Location

ATTEMPTS = 6
FIRST_DELAY_S = 0.5  # about 12 s in all, in addition to the retries of the file system itself

# S3's error codes of a conditional put whose condition fails, or which the store does not know.
NOT_CREATED = ("PreconditionFailed", "ConditionalRequestConflict", "NotImplemented")

T = TypeVar("T")

logger = logging.getLogger(__name__)


def retrying(action: Callable[[], T]) -> T:
    """Do something idempotent at a store until it succeeds, at most `ATTEMPTS` times, and return its result.

    The last StorageError is raised, or one that no other attempt can fix (no such bucket, access refused).
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
    """Call `Location.write` with retries."""
    retrying(lambda: location.write(data))


def create(location: Location, data: bytes) -> bool:
    """Write an object unless there is one, by a conditional put or an exclusive create, with retries.

    Returns whether it was written. False also if the store has no conditional puts, or if an earlier attempt succeeded
    and its answer was lost.
    """

    def put() -> bool:
        with storage_errors(location.url):
            try:
                if location.is_local:
                    os.makedirs(os.path.dirname(location.path) or ".", exist_ok=True)
                    with open(location.path, "xb") as file:
                        file.write(data)
                else:
                    location.fs.pipe_file(location.path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") not in NOT_CREATED:
                    raise
                return False
        return True

    return retrying(put)


def delete(location: Location, *, recursive: bool = False) -> None:
    """Call `Location.delete` with retries."""
    retrying(lambda: location.delete(recursive=recursive))
