"""Arrays in memory that processes share when they are started by "spawn" or "forkserver", which share none themselves.

The arrays lie in an anonymous file (Linux' memfd, which no limit of /dev/shm concerns) whose descriptor goes to the new
process beside its pickled arguments. It is gone when the last process that holds it ends.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SharedArrays:
    """One-dimensional arrays in shared memory; pickled only while a process is being started.

    Args:
        arrays: copied.
    """

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        self._file = os.fdopen(os.memfd_create("maskstream"), "wb")
        self._layout: list[tuple[str, int, int]] = []
        for array in arrays:
            self._file.seek(-(-self._file.tell() // 8) * 8)
            self._layout.append((array.dtype.str, len(array), self._file.tell()))
            self._file.write(np.ascontiguousarray(array).data)
        self._file.flush()

    def __reduce__(self) -> Any:
        return _opened, (DupFd(self._file.fileno()), self._layout)


def can_share() -> bool:
    """Whether what is pickled now goes to a process that is being started, on a system that has such memory."""
    return get_spawning_popen() is not None and hasattr(os, "memfd_create")


def _opened(descriptor: Any, layout: list[tuple[str, int, int]]) -> list[NDArray[Any]]:
    """In the new process: the arrays, read only."""
    with os.fdopen(descriptor.detach(), "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if os.fstat(file.fileno()).st_size else b""
    return [np.frombuffer(memory, dtype, count, start) for dtype, count, start in layout]
