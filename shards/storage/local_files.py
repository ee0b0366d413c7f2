"""Files of this machine: the kernel reads ahead into its page cache, as it is told, and a sample is read when it is
needed. Threads that hold the bytes in memory until then cost twice the processor time: another core has them in its
cache (`benchmarks/reads.py`)."""

from __future__ import annotations

import os

ADVICE = 128 * 2**10  # bytes; Linux follows an advice up to the read-ahead of the device, which is no less than this


def expect(path: str, start: int, end: int) -> None:
    """Tell the kernel that bytes `start` to `end` of a file will be read. A file that cannot be opened is left alone:
    reading will tell."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        with open(path, "rb", buffering=0) as file:
            for place in range(start, end, ADVICE):
                os.posix_fadvise(file.fileno(), place, min(ADVICE, end - place), os.POSIX_FADV_WILLNEED)
    except OSError:
        return


def read_file(path: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` (exclusive) of a file, or fewer where it ends before.

    Raises:
        OSError: what the system says.
    """
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        data = file.read(end - start)
        while len(data) < end - start and (more := file.read(end - start - len(data))):
            data += more  # a signal, or a limit of the file system, had cut it short
        return data
