"""Every example of docs/streaming.md, run in order."""

import re
from collections.abc import Iterator

import pytest

from demo.s3server import S3Server
from tests.support import REPOSITORY, sample, write_dataset

GUIDE = REPOSITORY / "docs" / "streaming.md"
BUCKET = "bucket"  # as in the guide


@pytest.fixture(scope="module")
def datasets(s3: S3Server) -> Iterator[None]:
    s3.make_bucket(BUCKET)
    train, val = [sample(n) for n in range(40)], [sample(n) for n in range(100, 107)]
    write_dataset(f"s3://{BUCKET}/streets", {"train": train, "val": val})
    write_dataset(f"s3://{BUCKET}/yards", {"train": [sample(n) for n in range(200, 220)]})
    yield
    s3.filesystem().rm(BUCKET, recursive=True)


@pytest.mark.slow
@pytest.mark.usefixtures("datasets")
def test_every_example_of_the_guide_runs(capfd: pytest.CaptureFixture[str]) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python") > 5
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        # Empty lines before it keep the line numbers of a failure those of the guide.
        code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(code, str(GUIDE), "exec"), names)
    assert len(capfd.readouterr().out.splitlines()) >= 20
