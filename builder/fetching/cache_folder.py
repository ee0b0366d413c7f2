"""The default folder of the table cache."""

from __future__ import annotations

import os


def default_cache_folder() -> str:
    """`$XDG_CACHE_HOME/maskstream` or `~/.cache/maskstream` (https://specifications.freedesktop.org/basedir-spec/)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative path.
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "maskstream")
