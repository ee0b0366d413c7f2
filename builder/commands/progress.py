"""Progress of a build: a bar on a terminal, a line of text every 15 seconds elsewhere."""

import logging
import sys
import time
from typing import Self

from tqdm import tqdm

from shards.common.text import counted

LINE_EVERY_S = 15.0

logger = logging.getLogger(__name__)


class Progress:
    """Context manager that counts images, bytes and failures and shows them."""

    def __init__(self) -> None:
        self._images = self._done = self._bytes = self._failed = 0
        self._started = self._last_line = time.monotonic()
        self._quiet = not sys.stderr.isatty()
        self._bar = tqdm(
            total=0,
            unit=" images",
            desc="packing",
            disable=self._quiet,
            dynamic_ncols=True,
            bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {rate_fmt}{postfix}, {remaining} left",
        )

    def expect(self, images: int) -> None:
        """Add to the number of expected images."""
        self._images += images
        self._bar.total = self._images
        self._bar.refresh()

    def advance(self, images: int, nbytes: int, failed: int) -> None:
        """Count finished images, the bytes fetched for them, and those that failed."""
        self._done += images
        self._bytes += nbytes
        self._failed += failed
        now = time.monotonic()
        seconds = max(now - self._started, 1e-3)
        rate = f"{self._bytes / 1e6 / seconds:.1f} MB/s, {self._failed} failed"
        self._bar.set_postfix_str(rate, refresh=False)
        self._bar.update(images)
        if self._quiet and (now - self._last_line >= LINE_EVERY_S or self._done == self._images):
            self._last_line = now
            speed = self._done / seconds
            left = duration((self._images - self._done) / max(speed, 1e-9))
            total = counted(self._images, "image")
            packed = self._done - self._failed
            logger.info("packed %d of %s, %.1f images/s, %s, %s left", packed, total, speed, rate, left)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """Return a duration as text: `48 s`, `7 min 5 s`, `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
