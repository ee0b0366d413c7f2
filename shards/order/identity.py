"""Whether a saved position still means the same batch."""

from collections.abc import Mapping
from typing import Any

from shards.common.errors import DatasetError
from shards.common.text import shown


def first_difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key whose values differ, and both values (None if missing); None if all are equal."""
    for key in {**saved, **now}:
        if saved.get(key) != now.get(key):
            return key, saved.get(key), now.get(key)
    return None


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a DatasetError if `order.identity()` of a saved position, as it was or from JSON, is another one now."""
    if not isinstance(saved, Mapping):
        raise DatasetError(f"identity is {shown(saved)}: give what order.identity() returned")
    if (found := first_difference(saved, now)) is not None:
        key, before, current = found
        what = "index (the fingerprint of dataset, split and selection)" if key == "index" else key
        raise DatasetError(
            f"order: the run was started with {what} {before!r}, now it is {current!r}: its position means another "
            "batch here; resume with the settings of the run, or start again with start=0 and no identity"
        )
