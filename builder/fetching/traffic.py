"""Counts of the requests sent to the sources and of the bytes received."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests sent and bytes received."""

    requests: int = 0
    nbytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.requests + other.requests, self.nbytes + other.nbytes)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.requests - other.requests, self.nbytes - other.nbytes)


@dataclass
class Meter:
    """Counts traffic; may be shared by threads."""

    total: Traffic = Traffic()
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, requests: int, nbytes: int) -> None:
        """Add requests and bytes to the total."""
        with self._lock:
            self.total += Traffic(requests, nbytes)


PROCESS = Meter()  # the traffic of this process that has no other meter: tables and zip directories
