"""A user's list of the very images to take: `--images-list`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from builder.fetching.fetch import Request, fetch_one
from builder.sources.openimages.layout import source_location
from shards.common.errors import UserError

# Also names of files in COCO: anything in one line, but nothing that climbs out of a folder.
_NAME = re.compile(r"(?!/)(?!.*(?:^|/)\.\.?(?:/|$))[^\\\x00-\x1f]{1,200}")


@dataclass(frozen=True, slots=True)
class ListedImage:
    """One line: an image, and the source's name of the split that the line restricts it to ("" for any)."""

    split: str
    name: str


def read_list(url: str, splits: Mapping[str, str]) -> tuple[ListedImage, ...]:
    """Read a list: one image a line, with or without a split before it (`train/0123456789abcdef`).

    Empty lines and lines that start with `#` do not count, a repeated line counts once, and an ending `.jpg` is left
    off: so a list of the official downloader is read as it is.

    Args:
        url: of the list, any fsspec URL or local path.
        splits: our names of splits -> the source's; a line may use either.

    Raises:
        UserError: not such a list.
        StorageError: it cannot be had.
    """
    try:
        text = fetch_one(Request(source_location(url))).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{url}: not UTF-8 text ({error}): --images-list takes one image id a line") from error
    prefixes = {**{theirs: theirs for theirs in splits.values()}, **splits}
    found: dict[ListedImage, None] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        first, slash, rest = entry.partition("/")
        split, name = (prefixes[first], rest) if slash and first in prefixes else ("", entry)
        if not _NAME.fullmatch(name):
            raise UserError(f"{url}: line {number} is {entry[:80]!r}, not an image id: write train/ID or ID")
        found[ListedImage(split, name.removesuffix(".jpg"))] = None
    if not found:
        raise UserError(f"{url}: lists no images: write one image id a line")
    return tuple(found)
