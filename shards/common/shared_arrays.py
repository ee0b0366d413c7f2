"""Arrays in shared memory for processes that are started by "spawn" or "forkserver".

They are in an anonymous file (Linux' memfd, which limits of /dev/shm do not affect) whose descriptor is sent to the
new process along with its pickled arguments. The memory is freed when the last process that has it open ends.
"""

import mmap
import os
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SharedArrays:
    """Copies of one-dimensional arrays in shared memory, which can be pickled only while a process is being started."""

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
    """Return whether a process is being started by pickling right now, on a system that has memfd."""
    return get_spawning_popen() is not None and hasattr(os, "memfd_create")


def _opened(descriptor: Any, layout: list[tuple[str, int, int]]) -> list[NDArray[Any]]:
    """Open the arrays in the new process, read only."""
    with os.fdopen(descriptor.detach(), "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if os.fstat(file.fileno()).st_size else b""
    return [np.frombuffer(memory, dtype, count, start) for dtype, count, start in layout]
