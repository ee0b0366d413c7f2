"""Whether the position of a run still means what it meant when it was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.common.errors import DatasetError
from shards.common.text import shown


def first_difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key that has two values, with the saved one and that of now (None where it has none); None if all are
    equal."""
    for key in {**saved, **now}:
        if saved.get(key) != now.get(key):
            return key, saved.get(key), now.get(key)
    return None


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with another order.

    Args:
        saved: what `order.identity()` of a stream was when the position was saved; from JSON or as it was.
        now: of the stream that is to go on.

    Raises:
        DatasetError: they differ; the first key that does is named with both values.
    """
    if not isinstance(saved, Mapping):
        raise DatasetError(f"identity is {shown(saved)}: give what order.identity() returned")
    found = first_difference(saved, now)
    if found is not None:
        key, was, is_now = found
        what = "index (the fingerprint of dataset, split and selection)" if key == "index" else key
        raise DatasetError(
            f"order: the run was begun with {what} {was!r}, now it is {is_now!r}: "
            "its position means nothing here; go on as it was begun, or begin anew with start=0 and no identity"
        )
