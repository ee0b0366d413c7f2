import errno

import pytest

from shards.storage.location import Location
from tests.support import Proxied


@pytest.mark.parametrize("kind", ["memory", "local", "s3"])
def test_a_folder_is_removed_with_all_its_objects(kind: str, request: pytest.FixtureRequest) -> None:
    places = {"memory": lambda: "memory://deletes", "local": lambda: str(request.getfixturevalue("tmp_path") / "x")}
    root = Location(places.get(kind, lambda: f"s3://{request.getfixturevalue('bucket')}")())
    for name in ("a/one", "a/b/two", "a/b/three #?%", "kept"):
        (root / name).write(b"x")
    (root / "a").delete(recursive=True)
    (root / "a").delete(recursive=True)
    assert [path.rpartition("/")[2] for path in root.fs.find(root.path)] == ["kept"]


def test_stores_that_refuse_to_delete_many_objects_delete_each(
    bucket: str, proxied: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request for many (a POST) needs a Content-MD5 on some stores, and botocore sends none."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "An error occurred (MissingContentMD5) when calling the DeleteObjects operation")

    with proxied() as proxy:
        root = Location(f"s3://{bucket}")
        for name in ("a/one", "a/b/two", "probe"):
            (root / name).write(b"x")
        monkeypatch.setattr(root.fs, "rm", refused)
        (root / "probe").delete()
        (root / "a").delete(recursive=True)
        assert root.fs.find(bucket) == []
    assert proxy.counters.requests["DELETE"] == 3
    assert not proxy.counters.requests["POST"]
