from pathlib import Path

import pytest

from builder.fetching.fetch import Request, fetch
from demo.s3server import S3Server
from shards.storage.location import Location

NAMES = ["plain.jpg", "a b.jpg", "a%20b.jpg", "50%.jpg", "100%25.jpg", "tag#1.jpg", "what?.jpg", "x?y=1&z#w.jpg"]
NAMES += ["a&b=c;d,e+f.jpg", "[x]{1}.jpg", "q'uote\".jpg", "bild_ä日本.jpg", "p|q~*.jpg", "my folder#2/50%25 (1).jpg"]


@pytest.mark.parametrize("kind", ["local", "s3", "http"])
def test_names_of_any_characters_are_those_of_files(kind: str, s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """A name is what the annotations state, not a part of a URL: it arrives as it is, whatever the kind of root."""
    for name in NAMES:
        if kind == "local":
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(name.encode())
        else:
            s3.filesystem().pipe_file(f"{bucket}/{name}", name.encode())
    root = Location({"local": str(tmp_path), "s3": f"s3://{bucket}", "http": f"{s3.endpoint_url}/{bucket}"}[kind])
    answers = fetch([Request(root / name) for name in NAMES])
    assert dict(zip(NAMES, answers, strict=True)) == {name: name.encode() for name in NAMES}
