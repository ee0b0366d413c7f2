"""How far a build is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 15.0

logger = logging.getLogger(__name__)


class Progress:
    """Counts images and bytes; a context manager.

    Args:
        images: that will be advanced over in all.
    """

    def __init__(self, images: int) -> None:
        self._images, self._done, self._bytes = images, 0, 0
        self._started = self._last_line = time.monotonic()
        self._quiet = not sys.stderr.isatty()
        self._bar = tqdm(total=images, unit=" images", desc="packing", disable=self._quiet, dynamic_ncols=True)

    def advance(self, images: int, nbytes: int) -> None:
        """So many images are done (packed or accounted for), and so many bytes were fetched for them."""
        self._done += images
        self._bytes += nbytes
        now = time.monotonic()
        rate = self._bytes / 1e6 / max(now - self._started, 1e-3)
        self._bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
        self._bar.update(images)
        if self._quiet and (now - self._last_line >= LINE_EVERY_S or self._done == self._images):
            self._last_line = now
            logger.info("packed %d of %d images, %.1f MB/s", self._done, self._images, rate)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
