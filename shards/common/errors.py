"""Errors for the user: one line that says what is wrong, where, with which value, and how to fix it."""


class UserError(Exception):
    """Bad input, a bad location or a bad object in storage; its text is the whole message.

    Commands print it as one line, without a traceback, and exit with status 2.
    """


class StorageError(UserError):
    """A URL that could not be reached, read or written.

    It is `missing` if the store has no such object, and `permanent` if another attempt cannot succeed either.
    """

    def __init__(self, message: str, *, missing: bool = False, permanent: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        self.permanent = permanent or missing


class DatasetError(UserError):
    """A shard dataset that is unfinished, of another format, or that contradicts itself."""


class SampleError(UserError):
    """A sample that is unavailable, or that does not have the contents that the format asks for."""


class UnavailableSampleError(SampleError):
    """A sample that storage does not return: a fault of the network or of a whole shard, not of the sample."""


class LoaderError(UserError):
    """A loader process that ended without an error of its own."""
