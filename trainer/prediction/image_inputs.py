"""Images that are named on a command line, and file names of their pictures."""

from __future__ import annotations

import asyncio
import os
import posixpath
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from shards.common.errors import UserError
from shards.common.redact import redact_url
from shards.storage.explain import storage_errors
from shards.storage.location import Location

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # of images in folders and globs
LARGEST = 512 * 2**20  # bytes of an image; Pillow's own limit of pixels is 512 MiB of RGB
TIMEOUT_S = 120.0  # for an image at an http URL


def read_image(url: str) -> bytes:
    """Return the bytes of an image; UserError if there are more than LARGEST, or if http takes more than TIMEOUT_S."""
    place = Location(url)
    with storage_errors(url):
        if place.protocol in ("http", "https"):
            from fsspec.asyn import sync

            data = sync(place.fs.loop, _download, place.fs, place.path)
        elif place.is_local:
            with open(place.path, "rb") as file:  # it may be a device, which has no size
                data = file.read(LARGEST + 1)
        elif (place.fs.size(place.path) or 0) > LARGEST:
            data = None
        else:
            data = place.fs.cat_file(place.path)
    if data is None or len(data) > LARGEST:
        raise UserError(f"{url}: it has more than {LARGEST >> 20} MiB: give an image")
    return bytes(data)


async def _download(fs: Any, url: str) -> bytes:
    """Return at most LARGEST + 1 bytes of what a server sends, whatever length it states."""
    parts, left = [], LARGEST + 1
    try:
        async with asyncio.timeout(TIMEOUT_S), (await fs.set_session()).get(fs.encode_url(url), **fs.kwargs) as answer:
            if answer.status in (404, 410):
                raise FileNotFoundError(url)
            answer.raise_for_status()
            async for part in answer.content.iter_any():
                parts.append(part[:left])
                left -= len(parts[-1])
                if not left:
                    break
    except TimeoutError as error:
        raise UserError(f"{url}: it did not arrive within {TIMEOUT_S:.0f} s: download it first") from error
    return b"".join(parts)


def find_images(names: Sequence[str]) -> list[str]:
    """Return the images of paths, URLs, folders and globs, each once; UserError if one of these has no image.

    A folder means the images directly in it, `**` in a glob folders of any depth; both are sorted. An http URL is one
    image.
    """
    first: dict[str, str] = {}
    for name in names:
        for image in _expand(name):
            first.setdefault(_place(image), image)
    return list(first.values())


def _place(image: str) -> str:
    """Return a key that is equal for all spellings of a path. A symbolic link is another path."""
    place = Location(image)
    if place.protocol in ("http", "https"):
        return image
    return os.path.abspath(place.path) if place.is_local else f"{place.protocol}://{place.path}"


def _expand(name: str) -> list[str]:
    place = Location(name)
    if place.protocol in ("http", "https"):
        return [name]
    with storage_errors(name):
        if any(sign in name for sign in "*?[") and not place.fs.exists(place.path):
            paths, missing = place.fs.glob(place.path), "nothing matches"
            if not name.lower().endswith(SUFFIXES):
                paths, missing = _images(paths), "no image matches"
        elif not name.lower().endswith(SUFFIXES) and place.fs.isdir(place.path):
            paths, missing = _images(place.fs.ls(place.path, detail=False)), "the folder has no image directly in it"
        else:
            return [name]
    if not paths:
        raise UserError(f"{name}: {missing} (an image ends with {', '.join(SUFFIXES)})")
    return sorted(path if place.is_local else place.sibling(path).url for path in paths)


def _images(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.lower().endswith(SUFFIXES)]


def stem(image: str) -> str:
    """Return the name of an image without folders and suffix, which is the ImageID of an Open Images file."""
    path = unquote(urlsplit(image).path) if "://" in image else image
    return posixpath.splitext(posixpath.basename(path))[0] or "image"


def file_name(image: str) -> str:
    """Return the `file_name` of an image in COCO's JSON: the absolute path, or the URL without credentials."""
    place = Location(image)
    return os.path.abspath(place.path) if place.is_local else redact_url(image)


def check_image_ids(images: Sequence[str]) -> None:
    """Raise UserError if two images would have the same ImageID in a submission."""
    seen: dict[str, str] = {}
    for image in images:
        name = stem(image)
        if name in seen:
            raise UserError(
                f"--submission: {seen[name]} and {image} would both have the ImageID {name}: rename one or leave it out"
            )
        seen[name] = image


def picture_names(images: Sequence[str], out: str) -> list[str]:
    """Return a file name in `out` for each image's picture: its own name with .jpg, numbered if it is taken.

    No picture replaces one of the images, even if these are in `out`.
    """
    taken = {_key(image) for image in images}
    names = []
    for image in images:
        name, number = f"{stem(image)}.jpg", 1
        while _key(f"{out.rstrip('/')}/{name}") in taken:
            number += 1
            name = f"{stem(image)}-{number}.jpg"
        taken.add(_key(f"{out.rstrip('/')}/{name}"))
        names.append(name)
    return names


def _key(url: str) -> str:
    """Return a key that is equal for paths that may be one file, also if the file system ignores case."""
    if "://" in url and not url.startswith("file://"):
        return url.casefold()
    return os.path.realpath(url.removeprefix("file://")).casefold()
