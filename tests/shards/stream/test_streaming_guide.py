import pytest

from demo.s3server import S3Server
from tests.support import run_examples, sample, write_dataset


@pytest.mark.slow
def test_every_example_of_the_guide_runs(s3: S3Server, capfd: pytest.CaptureFixture[str]) -> None:
    s3.make_bucket("bucket")  # as in the guide
    train, val = [sample(n) for n in range(40)], [sample(n) for n in range(100, 107)]
    write_dataset("s3://bucket/streets", {"train": train, "val": val})
    write_dataset("s3://bucket/yards", {"train": [sample(n) for n in range(200, 220)]})
    assert run_examples("streaming.md", {"__name__": "guide"}) > 5
    assert len(capfd.readouterr().out.splitlines()) >= 20
    s3.filesystem().rm("bucket", recursive=True)
