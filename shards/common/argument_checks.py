"""Arguments of another type than they should be: one line that says what to give instead.

A loop of one's own has no command line that would have looked at them. They are made plain numbers of Python's, which
JSON knows, so that the identity of an order can be kept.
"""

from __future__ import annotations

import operator
import os
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import DatasetError
from shards.common.text import counted, shown


def whole(name: str, value: Any) -> int:
    """A whole number: Python's, numpy's, or a tensor's.

    Raises:
        DatasetError: it is none; `name` is named.
    """
    try:
        return int(operator.index(value))
    except TypeError:
        hint = f", int({value!r})" if isinstance(value, str) and value.strip().isdecimal() else ""
        raise DatasetError(f"{name} is {shown(value)}: give a whole number{hint}") from None


def real(name: str, value: Any) -> float:
    """A number, whole or not.

    Raises:
        DatasetError: it is none; `name` is named.
    """
    if not isinstance(value, Real):
        raise DatasetError(f"{name} is {shown(value)}: give a number")
    return float(value)


def path_or_url(value: Any) -> str:
    """Where a dataset lies: a string, or a path.

    Raises:
        DatasetError: it is neither.
    """
    if not isinstance(value, str | os.PathLike):
        raise DatasetError(
            f"the root of a dataset is {shown(value)}: give a local path or a URL such as s3://bucket/prefix"
        )
    return str(os.fspath(value))


def row_numbers(rows: Any, samples: int) -> NDArray[np.int64]:
    """Rows (n,) of an index with so many samples, ascending, each once.

    Raises:
        DatasetError: they are not that.
    """
    found = np.asarray(rows)
    if found.ndim != 1 or not (len(found) == 0 or np.issubdtype(found.dtype, np.integer)):
        raise DatasetError(
            f"rows is an array of {found.dtype} of shape {found.shape}: give the numbers of rows, one after the other "
            "(of a mask: np.flatnonzero(mask))"
        )
    if len(found) and not 0 <= found.min() <= found.max() < samples:
        raise DatasetError(
            f"rows holds {found.min()} to {found.max()}: the split has {counted(samples, 'sample')}, numbered from 0"
        )
    if np.any(found[1:] <= found[:-1]):
        raise DatasetError("rows are not ascending, each once: give np.unique(rows)")
    return found.astype(np.int64)
