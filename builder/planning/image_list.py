"""An explicit list of the images to pack: `--images-list`."""

from collections.abc import Mapping
from dataclasses import dataclass

from builder.fetching.fetch import Request, fetch_one
from builder.sources.base import FILE_NAME
from builder.sources.openimages.layout import source_location
from shards.common.errors import UserError


@dataclass(frozen=True, slots=True)
class ListedImage:
    """One line of a list: the source's name of the split that it restricts the image to ("" for any), and the image."""

    split: str
    name: str


@dataclass(frozen=True, slots=True)
class ImageList:
    """A list of the images to pack, whatever classes they hold, at a fsspec URL or local path.

    One image per line, optionally prefixed by a split (`train/0123456789abcdef`). Empty lines and lines that start
    with `#` are ignored, a repeated line counts once, and a trailing `.jpg` is dropped: lists of the official
    downloader work unchanged.
    """

    url: str

    def read(self, splits: Mapping[str, str]) -> tuple[ListedImage, ...]:
        """Read the list; names of splits may be the dataset's or the source's, the keys and values of `splits`."""
        try:
            text = fetch_one(Request(source_location(self.url))).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            message = f"{self.url}: not UTF-8 text ({error}): --images-list takes one image id per line"
            raise UserError(message) from error
        prefixes = {name: name for name in splits.values()} | dict(splits)
        found: dict[ListedImage, None] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            entry = line.strip()
            if not entry or entry.startswith("#"):
                continue
            first, slash, rest = entry.partition("/")
            split, name = (prefixes[first], rest) if slash and first in prefixes else ("", entry)
            if not FILE_NAME.fullmatch(name):
                raise UserError(f"{self.url}: line {number} is {entry[:80]!r}, not an image id: write train/ID or ID")
            found[ListedImage(split, name.removesuffix(".jpg"))] = None
        if not found:
            raise UserError(f"{self.url}: lists no images: write one image id per line")
        return tuple(found)
