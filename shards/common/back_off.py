"""Exponential back-off with jitter: the delays between attempts at something that may fail for a moment."""

import random
import time
from collections.abc import Iterator

DAMAGED_READS = 5  # reads of bytes that do not match their checksum, in total
SCALE = 1.0  # multiplies every delay; tests set it to 0


def delay(failures: int, first_s: float = 0.2, longest_s: float = 4.0) -> float:
    """Return the seconds to wait after `failures` in a row (1 or more): on average `first_s`, doubled each time.

    The average is at most `longest_s`. Jitter keeps many processes from asking an overloaded server at the same moment.
    """
    return SCALE * min(first_s * 2.0 ** (failures - 1), longest_s) * random.uniform(0.5, 1.5)


def attempts(count: int, first_s: float = 0.2, longest_s: float = 4.0) -> Iterator[int]:
    """Yield 1, 2, ..., `count`, and sleep for `delay` seconds before each attempt after the first."""
    for number in range(1, count + 1):
        if number > 1:
            time.sleep(delay(number - 1, first_s, longest_s))
        yield number
