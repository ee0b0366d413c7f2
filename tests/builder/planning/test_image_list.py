from pathlib import Path

import pytest

from builder.planning.image_list import ImageList, ListedImage
from builder.sources.openimages.layout import SOURCE_SPLITS
from shards.common.errors import UserError


def listed(path: Path, data: bytes) -> tuple[ListedImage, ...]:
    (path / "ids.txt").write_bytes(data)
    return ImageList(str(path / "ids.txt")).read(SOURCE_SPLITS)


def test_read_accepts_splits_comments_suffixes_and_line_ends(tmp_path: Path) -> None:
    text = "\ufeff# mine\r\ntrain/0a\r\n\r\n  val/0b \r\nvalidation/0c.jpg\r\n0d\n0d\n"
    found = [("train", "0a"), ("validation", "0b"), ("validation", "0c"), ("", "0d")]
    assert [(image.split, image.name) for image in listed(tmp_path, text.encode())] == found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "lists no images"),
        (b"# nothing\n\n", "lists no images"),
        (b"0a\n../../etc/passwd\n", "line 2"),
        (b"train//etc/passwd\n", "line 1"),
        (b"a\\b\n", "line 1"),
        (b"a" * 1100, "line 1"),
        (b"\xff\xfe0\x00", "UTF-8"),
    ],
)
def test_files_that_are_no_list_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        listed(tmp_path, data)
