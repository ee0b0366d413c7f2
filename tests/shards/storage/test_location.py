import multiprocessing
import os
import sys
import threading
from concurrent.futures import Future
from contextlib import ExitStack

import pytest

from shards.common.errors import StorageError
from shards.format.dataset import open_dataset
from shards.storage.location import Location, check_writable
from shards.storage.reads import Read, read_many
from shards.stream.reader import SampleReader
from tests.support import forget_connections, sample, write_dataset


@pytest.fixture(scope="module")
def bucket(s3):
    s3.make_bucket("storage-tests")
    return "s3://storage-tests"


def one_line_error(action) -> StorageError:
    with pytest.raises(StorageError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("place", ["local", "s3"])
def test_an_object_is_written_and_read_whole_or_in_ranges(place, tmp_path, request):
    root = Location(str(tmp_path)) if place == "local" else Location(request.getfixturevalue("bucket"))
    target = root / "a" / "b.bin"
    data = bytes(range(256)) * 100
    assert not target.exists()
    target.write(data)
    assert target.exists()
    assert target.read() == data
    assert read_many([Read(target, 100, 20_000), Read(target, 25_000, 99_999)]) == [data[100:20_000], data[25_000:]]
    target.write(b"new")
    assert target.read() == b"new"
    target.delete()
    assert not target.exists()
    target.delete()


def test_a_public_bucket_is_read_without_signature_over_s3_and_http(bucket, s3):
    (Location(bucket) / "public.bin").write(b"0123456789")
    unsigned = Location(f"{bucket}/public.bin", anonymous=True)
    over_http = Location(f"{s3.endpoint_url}/storage-tests/public.bin")
    assert read_many([Read(unsigned, 2, 5), Read(over_http, 2, 5)]) == [b"234", b"234"]


@pytest.mark.parametrize(
    ("url", "message", "permanent"),
    [
        ("s3://no-such-bucket/a", "{url}: the bucket does not exist", True),
        ("s3://storage-tests/missing", "{url}: there is no such object", True),
        ("/no/such/file", "{url}: there is no such object", True),
        ("{root}/file/dataset.json", "{url}: {root}/file is a file, not a folder", True),
        ("nosuch://x/y", "{url}: no file system for nosuch://", False),
    ],
)
def test_reading_what_does_not_exist_is_one_line_with_a_remedy(bucket, tmp_path, url, message, permanent):
    (tmp_path / "file").touch()
    url = url.format(root=tmp_path)
    error = one_line_error(Location(url).read)
    assert str(error).startswith(message.format(url=url, root=tmp_path))
    assert error.permanent is permanent


@pytest.mark.parametrize("url", ["s3://", "s3:", "s3:/bucket/key", "s3:///key", "http://", "https:/host/a"])
def test_a_remote_url_without_a_bucket_or_host_is_not_a_local_path(url):
    with pytest.raises(StorageError, match=rf"^{url}: it names no (bucket|host): give (s3|https?)://"):
        Location(url)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/a/b", "{root}/file is a file, not a folder: correct the path"),
        ("folder", "it is a folder, not a file: correct the path"),
        ("/proc/nowhere/a", "nothing can be written there: give another place"),
    ],
)
def test_a_failed_local_write_names_the_reason_and_leaves_nothing_behind(tmp_path, place, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    target = Location(str(tmp_path / place))
    error = one_line_error(lambda: target.write(b"x"))
    assert str(error) == f"{target}: {message.format(root=tmp_path)}"
    assert error.permanent
    assert not error.missing
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("place", ["local", "s3", "memory"])
def test_check_writable_leaves_a_writable_place_unchanged(bucket, tmp_path, place):
    roots = {"local": f"{tmp_path}", "s3": f"{bucket}/tried", "memory": "memory://tried"}
    root = Location(roots[place])
    (root / "kept").write(b"")
    for folder in (root, root / "runs" / "one"):
        check_writable(folder, "--out")
    assert [str(name).rsplit("/", 1)[-1] for name in root.fs.find(root.path)] == ["kept"]
    assert os.listdir(tmp_path) == (["kept"] if place == "local" else [])  # and no folder


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/a/b", "{place}: cannot be written ({root}/file is not a writable folder): choose another --out"),
        ("link/a", "{place}: cannot be written ({root}/link is not a writable folder): choose another --out"),
        ("/proc/nowhere/a", "{place}: cannot be written (/proc is not a writable folder): choose another --out"),
        ("s3://no-such-bucket/a", "--out cannot be written: {place}/.probe: the bucket does not exist: create it, "),
        ("refused", "--out cannot be written: {place}/.probe: access was refused (Access Denied"),
        ("data://a", "{place}: cannot be written (ValueError('Read only filesystem')): choose another --out"),
        ("nosuch://a", "--out cannot be written: {place}/.probe: no file system for nosuch://"),
    ],
)
def test_check_writable_refuses_a_place_that_cannot_be_written(bucket, tmp_path, place, message):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    if place == "refused":
        folder = Location(f"{bucket}/refused", anonymous=True)
    else:
        folder = Location(place if "://" in place else str(tmp_path / place))
    error = one_line_error(lambda: check_writable(folder, "--out"))
    assert str(error).startswith(message.format(place=folder, root=tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "http://", "minio:9000"])
def test_an_endpoint_that_is_not_a_url_is_reported_as_such(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    forget_connections(monkeypatch)
    root = Location("s3://bucket/data", anonymous=True)
    place = root / "dataset.json"
    for action in (lambda: open_dataset(root), place.exists, place.read, lambda: place.write(b"1")):
        error = one_line_error(action)
        assert str(error).endswith(f"Invalid endpoint: {endpoint}: give http://host:port in AWS_ENDPOINT_URL")
        assert error.permanent


def test_missing_credentials_name_the_way_to_read_a_public_bucket(bucket, monkeypatch):
    place = Location(bucket) / "secret.bin"
    place.write(b"01")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    forget_connections(monkeypatch)
    for action in (place.read, lambda: open_dataset(bucket)):
        error = one_line_error(action)
        assert "no AWS credentials were found: " in str(error)
        assert "open_dataset(Location(url, anonymous=True))" in str(error)
    assert Location(place.url, anonymous=True).read() == b"01"


def module_locks():
    """Yield the locks of the modules of `shards`, and those within their futures."""
    modules = [module for name, module in sys.modules.items() if name.startswith("shards.")]
    for value in [value for module in modules for value in vars(module).values()]:
        lock = value._condition if isinstance(value, Future) else value
        if isinstance(lock, type(threading.Lock()) | type(threading.RLock()) | threading.Condition):
            yield lock


def test_forked_children_read_whatever_other_threads_do(bucket):
    """A thread may have any lock at the moment of the fork, and connections of the parent stay its own."""
    dataset = write_dataset(f"{bucket}/locks", {"train": [sample(n) for n in range(4)]})
    locked, forked = threading.Event(), threading.Event()

    def lock_all():
        with ExitStack() as stack:
            for lock in module_locks():
                stack.enter_context(lock)
            locked.set()
            forked.wait()

    other = threading.Thread(target=lock_all)
    other.start()
    locked.wait()
    children = [multiprocessing.get_context("fork").Process(target=read_all, args=(dataset,)) for _ in range(3)]
    for child in children:
        child.start()
    forked.set()
    other.join()
    for child in children:
        child.join(60)
        child.kill()
    assert [child.exitcode for child in children] == [0, 0, 0]
    read_all(dataset)


def read_all(dataset):
    assert (dataset.root / "dataset.json").read().startswith(b"{")
    assert len(list(SampleReader(dataset.root, dataset.index("train")).read(range(4)))) == 4
