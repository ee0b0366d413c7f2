"""Tables for a terminal and for Markdown, rendered from pandas DataFrames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from shards.common.text import columns_of, printable

if TYPE_CHECKING:
    import pandas as pd

Formats = Mapping[Any, Callable[[Any], str]]

MISSING = "-"
WIDEST = 60  # terminal columns; a longer name shifts its own line only
GAP = "  "


def percent(fraction: float) -> str:
    """Format a fraction from 0 to 1 as a whole percentage."""
    return f"{fraction:.0%}"


def text_table(table: pd.DataFrame, formats: Formats | None = None, *, indent: str = "") -> list[str]:
    """Render the columns of a table for a terminal: header lines, then one line per row; text is aligned left.

    Columns align for names of any script. Control characters of names are escaped.

    Args:
        table: columns with several levels get one header line per level, and equal neighbours of an upper level are
            written once, above the last of them.
        formats: for some columns, how a value becomes text. Other floats get one decimal, missing values `MISSING`.
        indent: what every line starts with.
    """
    text = [any(isinstance(value, str) for value in table[name]) for name in table.columns]
    columns = [[*header, *cells] for header, cells in zip(_headers(table), _cells(table, formats or {}), strict=True)]
    widths = [min(max(map(columns_of, cells)), WIDEST) for cells in columns]
    lines = []
    for row in zip(*columns, strict=True):
        gaps = [" " * (width - columns_of(cell)) for cell, width in zip(row, widths, strict=True)]
        aligned = [cell + gap if left else gap + cell for cell, gap, left in zip(row, gaps, text, strict=True)]
        lines.append((indent + GAP.join(aligned)).rstrip())
    return lines


def markdown_table(table: pd.DataFrame, formats: Formats | None = None) -> list[str]:
    """Render a table of one header line for Markdown; `formats` as for `text_table`."""
    columns = [[str(name), "---", *cells] for name, cells in zip(table, _cells(table, formats or {}), strict=True)]
    rows = [[cell.replace("|", r"\|") for cell in row] for row in zip(*columns, strict=True)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _headers(table: pd.DataFrame) -> list[list[str]]:
    """Return the header cells of each column, one per level of the columns."""
    names = [name if isinstance(name, tuple) else (name,) for name in table.columns]
    headers = []
    for name, following in zip(names, [*names, ()][1:], strict=True):
        upper = ["" if following[: level + 1] == name[: level + 1] else name[level] for level in range(len(name) - 1)]
        headers.append([*map(str, upper), str(name[-1])])
    return headers


def _cells(table: pd.DataFrame, formats: Formats) -> list[list[str]]:
    import pandas as pd

    def cell(value: Any, form: Callable[[Any], str]) -> str:
        return MISSING if pd.isna(value) else printable(form(value))

    def plain(value: Any) -> str:
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    return [[cell(value, formats.get(name, plain)) for value in table[name]] for name in table.columns]
