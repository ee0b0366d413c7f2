"""Progress of a command on stderr: a bar on a terminal, elsewhere a line of text now and then."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, TextIO

from tqdm import tqdm

from shards.common.text import duration

LINE_EVERY_S = 15.0
BAR_AFTER_S = 1.0  # most work takes less

_bars = dict[int, int]()  # how many are drawn, by the process


def above_bars(stream: TextIO) -> AbstractContextManager[object]:
    """Return a context in which text is written above the bars of this process.

    Without a bar it does nothing. So a loader process, which may be killed at any time, never holds tqdm's lock, which
    it shares with its parent.
    """
    return tqdm.external_write_mode(file=stream) if _bars.get(os.getpid()) else nullcontext()


class Progress:
    """Context manager that counts what is done of `total`, and shows it; a bar vanishes at the end.

    Args:
        what: what is being done, such as `packing`.
        total: how much there is to do; `expect` adds to it.
        unit: of what is counted, such as `images`, or `MB`.
        report: writes a line of text, such as a logger's `info`; without a terminal, it is called every `LINE_EVERY_S`.
        is_shown: False on all ranks but the main one.
    """

    def __init__(
        self, what: str, total: float, unit: str, report: Callable[[str], None], *, is_shown: bool = True
    ) -> None:
        self._what, self._unit, self._report = what, unit, report
        self._done, self._total, self._is_shown = 0.0, total, is_shown
        self._started = self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None

    def expect(self, more: float) -> None:
        """Add to the total."""
        self._total += more

    def advance(self, count: float, note: str = "") -> None:
        """Count what was done; `note` is shown after the speed."""
        self._done += count
        now = time.monotonic()
        if not self._is_shown:
            return
        if sys.stderr.isatty():
            self._advance_bar(count, note, now - self._started)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._report(self._line(note, now - self._started))

    def _advance_bar(self, count: float, note: str, seconds: float) -> None:
        # Not tqdm's `delay`: a bar that is delayed is drawn by `external_write_mode`, and then stays.
        if seconds < BAR_AFTER_S:
            return
        if self._bar is None:
            self._bar = tqdm(
                total=self._total,
                unit=f" {self._unit}",
                desc=self._what,
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc}: {n:.0f}/{total:.0f}{unit} |{bar}| {rate_fmt}{postfix}, {remaining} left",
            )
            _bars[os.getpid()] = _bars.get(os.getpid(), 0) + 1
            self._bar.start_t = self._bar.last_print_t = self._bar.last_print_t - seconds  # the speed is since then
            count = self._done
        self._bar.total = self._total
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def _line(self, note: str, seconds: float) -> str:
        speed = self._done / max(seconds, 1e-3)
        left = duration(max(self._total - self._done, 0) / max(speed, 1e-9))
        done = f"{self._what}: {self._done:.0f} of {self._total:.0f} {self._unit}"
        return ", ".join(filter(None, (done, f"{speed:.1f} {self._unit}/s", note, f"{left} left")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            _bars[os.getpid()] -= 1


class LogHandler(logging.StreamHandler):
    """Handler that writes above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        with above_bars(self.stream):
            super().emit(record)
