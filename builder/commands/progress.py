"""Progress of packing."""

import logging
import time

from shards.commands.progress import Progress

logger = logging.getLogger(__name__)


class PackingProgress(Progress):
    """Counts images, the bytes fetched for them, and those that failed."""

    def __init__(self) -> None:
        super().__init__("packing", 0, "images", logger.info)
        self._began, self._nbytes, self._failed = time.monotonic(), 0, 0

    def add(self, images: int, nbytes: int, failed: int) -> None:
        """Count images that were packed or failed."""
        self._nbytes += nbytes
        self._failed += failed
        rate = self._nbytes / 1e6 / max(time.monotonic() - self._began, 1e-3)
        self.advance(images, f"{rate:.1f} MB/s, {self._failed} failed")
