"""Which images a command line means, and what their pictures are called."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from shards.common.errors import UserError
from shards.storage.explain import storage_errors
from shards.storage.location import Location

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # what is an image in a folder


def find_images(names: Sequence[str]) -> list[str]:
    """The images that paths, URLs, folders and globs stand for; what a folder or a glob finds is sorted.

    A folder stands for the images directly in it, `**` in a glob for folders of any depth. An http URL is one image.
    An image that several of them stand for comes once, where it is first.

    Raises:
        UserError: a folder without images, a glob that matches nothing.
        StorageError: a place could not be asked.
    """
    first: dict[str, str] = {}
    for name in names:
        for image in _expand(name):
            first.setdefault(_place(image), image)
    return list(first.values())


def _place(image: str) -> str:
    """Equal for one path however it is written; a link to a file is another path."""
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
    return sorted(path if place.is_local else str(place.fs.unstrip_protocol(path)) for path in paths)


def _images(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.lower().endswith(SUFFIXES)]


def stem(image: str) -> str:
    """The name of an image without folders and suffix: of an Open Images file, its ImageID."""
    path = unquote(urlsplit(image).path) if "://" in image else image
    return posixpath.splitext(posixpath.basename(path))[0] or "image"


def check_image_ids(images: Sequence[str]) -> None:
    """Whether a submission can tell these images apart.

    Raises:
        UserError: two would have the same ImageID.
    """
    seen: dict[str, str] = {}
    for image in images:
        name = stem(image)
        if name in seen:
            raise UserError(
                f"--submission: {seen[name]} and {image} would both have the ImageID {name}: rename one or leave it out"
            )
        seen[name] = image


def picture_names(images: Sequence[str], out: str) -> list[str]:
    """A file name in `out` for each image's picture: its own name with .jpg, numbered where two would meet.

    No picture takes the place of an image that is asked for, even when images lie in `out`.
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
    """Equal for equal places, also where letters of both cases are one file."""
    if "://" in url and not url.startswith("file://"):
        return url.casefold()
    return os.path.realpath(url.removeprefix("file://")).casefold()
