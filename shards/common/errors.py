"""The errors that a user is meant to read: one line that says what, where, the value and the remedy."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Bad input, a bad place or a bad object in storage; its text is the whole message.

    Commands print it as one line and exit with status 2; it never comes with a traceback.
    """


class StorageError(UserError):
    """A URL that could not be reached, read or written.

    Attributes:
        missing: the place answers that there is no such object.
        permanent: asking again cannot help (missing, refused), as far as the answer tells.
    """

    def __init__(self, message: str, *, missing: bool = False, permanent: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        self.permanent = permanent or missing

    def __reduce__(self) -> tuple[Any, ...]:
        return _storage_error, (str(self), self.missing, self.permanent)


def _storage_error(message: str, missing: bool, permanent: bool) -> StorageError:
    return StorageError(message, missing=missing, permanent=permanent)


class DatasetError(UserError):
    """A shard dataset that is unfinished, of another format, or that contradicts itself."""


class SampleError(UserError):
    """A sample that could not be had or does not hold what its format promises."""


class LoaderError(UserError):
    """A loader process that ended without having said why."""
