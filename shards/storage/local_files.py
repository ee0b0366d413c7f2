"""Reading and writing files of this machine.

The kernel is asked to read ahead into its page cache, and a sample is read when it is needed. Threads that keep the
bytes in memory until then cost twice the processor time (`benchmarks/reads.py`): another core has them in its cache.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

ADVICE = 128 * 2**10  # bytes; Linux follows an advice up to the device's read-ahead, which is at least this much


@contextmanager
def atomic_write(path: str, *, temporary: str = "", durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` whole or not at all.

    Its folder is created. The bytes go to the name `temporary`, by default one of this process and thread, which is
    renamed at the end of the `with` block, or removed after an exception. A kill leaves it, and what was at `path`
    before. If `durable`, that also holds for a crash of the machine.
    """
    temporary = temporary or f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def expect(path: str, start: int, end: int) -> None:
    """Announce to the kernel that bytes `start` to `end` of a file will be read; reading raises any error."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), open(path, "rb", buffering=0) as file:
        for offset in range(start, end, ADVICE):
            os.posix_fadvise(file.fileno(), offset, min(ADVICE, end - offset), os.POSIX_FADV_WILLNEED)


def read_file(path: str, start: int, end: int) -> bytes:
    """Return bytes `start` to `end` (exclusive) of a file, or fewer if it ends before."""
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        data = file.read(end - start)
        while len(data) < end - start and (more := file.read(end - start - len(data))):
            data += more  # a signal or a limit of the file system cut the read short
        return data
