import multiprocessing
import os
import pickle
import sys
import threading
from concurrent.futures import Future
from contextlib import ExitStack

import pytest

from shards.common.errors import StorageError
from shards.format.dataset import open_dataset
from shards.storage.explain import explain
from shards.storage.location import Location, check_writable
from shards.storage.ranges import Read, read_many
from shards.stream.loader import loader
from shards.stream.reader import SampleReader
from shards.stream.streams import ShardStream
from tests.support import sample, write_dataset


@pytest.fixture(scope="module")
def bucket(s3):
    s3.make_bucket("storage-tests")
    return "s3://storage-tests"


@pytest.mark.parametrize("place", ["local", "s3"])
def test_an_object_is_written_and_read_whole_or_in_ranges(place, tmp_path, request):
    root = Location(str(tmp_path)) if place == "local" else Location(request.getfixturevalue("bucket"))
    target = root / "a" / "b.bin"
    data = bytes(range(256)) * 100
    assert not target.exists()
    target.write(data)
    assert target.exists()
    assert target.size() == len(data)
    assert target.read() == data
    assert read_many([Read(target, 100, 20_000), Read(target, 25_000, 99_999)]) == [data[100:20_000], data[25_000:]]
    target.write(b"new")
    assert target.read() == b"new"
    target.delete()
    assert not target.exists()
    target.delete()


def test_a_public_bucket_is_read_unsigned_over_s3_and_over_http(bucket, s3):
    (Location(bucket) / "public.bin").write(b"0123456789")
    unsigned = Location(f"{bucket}/public.bin", anonymous=True)
    over_http = Location(f"{s3.endpoint_url}/storage-tests/public.bin")
    assert over_http.size() == 10
    assert read_many([Read(unsigned, 2, 5), Read(over_http, 2, 5)]) == [b"234", b"234"]


def test_a_failed_local_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError):
        Location(str(tmp_path / "taken")).write(b"x")
    assert sorted(os.listdir(tmp_path)) == ["taken"]


@pytest.mark.parametrize(
    ("url", "message", "permanent"),
    [
        ("s3://no-such-bucket/a", r"^s3://no-such-bucket/a: the bucket does not exist", True),
        ("s3://storage-tests/missing", r"^s3://storage-tests/missing: there is no such object", True),
        ("/no/such/file", r"^/no/such/file: there is no such object", True),
        ("nosuch://x/y", r"^nosuch://x/y: no file system for nosuch://", False),
    ],
)
def test_what_is_not_there_is_one_line_with_a_remedy(bucket, url, message, permanent):
    with pytest.raises(StorageError, match=message) as caught:
        Location(url).read()
    assert "\n" not in str(caught.value)
    assert caught.value.permanent is permanent


@pytest.mark.parametrize("url", ["s3://", "s3:", "s3:/bucket/key", "s3:///key", "http://", "https:/host/a"])
def test_a_remote_url_without_a_bucket_or_host_is_no_local_folder(url):
    with pytest.raises(StorageError, match=rf"^{url}: it names no (bucket|host): give (s3|https?)://"):
        Location(url)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/a", "{root}/file is a file, not a folder: correct the path"),
        ("file/a/b", "{root}/file is a file, not a folder: correct the path"),
        ("folder", "it is a folder, not a file: correct the path"),
        ("/proc/nowhere", "nothing can be written there: give another place"),
        ("/proc/nowhere/a", "nothing can be written there: give another place"),
    ],
)
def test_a_local_place_that_cannot_be_written_is_told_with_its_reason(tmp_path, place, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    target = Location(str(tmp_path / place))
    with pytest.raises(StorageError) as caught:
        target.write(b"x")
    assert str(caught.value) == f"{target}: {message.format(root=tmp_path)}"
    assert caught.value.permanent
    assert not caught.value.missing


@pytest.mark.parametrize("place", ["local", "s3", "memory"])
def test_a_place_that_can_be_written_is_left_as_it_was(bucket, tmp_path, place):
    roots = {"local": f"{tmp_path}", "s3": f"{bucket}/tried", "memory": "memory://tried"}
    root = Location(roots[place])
    (root / "kept").write(b"")
    for folder in (root, root / "runs" / "one"):
        check_writable(folder, "--out")
    assert [str(name).rsplit("/", 1)[-1] for name in root.fs.find(root.path)] == ["kept"]
    assert os.listdir(tmp_path) == (["kept"] if place == "local" else [])  # nor a folder


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "{place}: cannot be written ({root}/file is not a writable folder): choose another --out"),
        ("file/a/b", "{place}: cannot be written ({root}/file is not a writable folder): choose another --out"),
        ("link/a", "{place}: cannot be written ({root}/link is not a writable folder): choose another --out"),
        ("/proc/nowhere/a", "{place}: cannot be written (/proc is not a writable folder): choose another --out"),
        ("s3://no-such-bucket/a", "--out cannot be written: {place}/.probe: the bucket does not exist: create it, "),
        ("refused", "--out cannot be written: {place}/.probe: access was refused (Access Denied"),
        ("data://a", "{place}: cannot be written (ValueError('Read only filesystem')): choose another --out"),
        ("nosuch://a", "--out cannot be written: {place}/.probe: no file system for nosuch://"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_anything_is(bucket, tmp_path, place, message):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    if place == "refused":
        folder = Location(f"{bucket}/refused", anonymous=True)
    else:
        folder = Location(place if "://" in place else str(tmp_path / place))
    with pytest.raises(StorageError) as caught:
        check_writable(folder, "--out")
    assert str(caught.value).startswith(message.format(place=folder, root=tmp_path))
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_what_lies_beneath_a_file_cannot_be_read_and_the_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=rf"{tmp_path}/file is a file, not a folder"):
        Location(str(tmp_path / "file" / "dataset.json")).read()


def test_a_refusal_on_a_disk_speaks_of_permissions_and_one_of_a_bucket_of_its_policy():
    refused = PermissionError(13, "Permission denied")
    assert "check the permissions of the file" in str(explain(refused, "/data/a"))
    assert "the bucket's policy" in str(explain(refused, "s3://bucket/a"))


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "http://", "minio:9000"])
def test_an_endpoint_that_is_no_url_is_told_as_such(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr("shards.storage.location._instances", {})
    message = rf"^s3://bucket/data/[^\n]*Invalid endpoint: {endpoint}: give http://host:port in AWS_ENDPOINT_URL$"
    with pytest.raises(StorageError, match=message):
        open_dataset(Location("s3://bucket/data", anonymous=True))
    for ask in (Location.exists, Location.read, lambda place: place.write(b"1")):
        with pytest.raises(StorageError, match=message) as caught:
            ask(Location("s3://bucket/data/dataset.json", anonymous=True))
        assert caught.value.permanent


def test_missing_credentials_name_what_reads_a_public_bucket(bucket, monkeypatch):
    (Location(bucket) / "told.bin").write(b"01")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setattr("shards.storage.location._instances", {})
    monkeypatch.setattr("shards.storage.buckets._addresses", {})
    monkeypatch.setattr("shards.storage.buckets._known", {})
    told = r"^[^\n]*no AWS credentials were found: [^\n]*open_dataset\(Location\(url, anonymous=True\)\)\)$"
    with pytest.raises(StorageError, match=told):
        Location(f"{bucket}/told.bin").read()
    with pytest.raises(StorageError, match=told):
        open_dataset(bucket)
    assert Location(f"{bucket}/told.bin", anonymous=True).read() == b"01"


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(StorageError("gone", permanent=True)))  # noqa: S301 (our own bytes, made here)
    assert (str(error), error.permanent) == ("gone", True)


def _read(location, queue):
    queue.put(location.read())


def test_a_forked_child_makes_its_own_connections(bucket):
    location = Location(bucket) / "forked.bin"
    location.write(b"hello")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read, args=(location, queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert [queue.get(timeout=30) for _ in children] == [b"hello"] * 3
    for child in children:
        child.join(30)
    assert location.read() == b"hello"


def test_a_dataset_streams_from_s3_as_it_does_from_a_disk(bucket, tmp_path):
    splits = {"train": [sample(n) for n in range(20)]}
    local, remote = (write_dataset(root, splits) for root in (tmp_path, f"{bucket}/dataset"))
    assert open_dataset(f"{bucket}/dataset").info == local.info
    read = []
    for dataset in (local, remote):
        batches = iter(loader(ShardStream(dataset, "train", batch_size=4, seed=1), workers=2))
        read.append([next(batches) for _ in range(7)])
    assert read[0] == read[1]


def module_locks():
    """The locks of the modules of `shards`, and those within their futures."""
    modules = [module for name, module in sys.modules.items() if name.startswith("shards.")]
    for value in [value for module in modules for value in vars(module).values()]:
        lock = value._condition if isinstance(value, Future) else value
        if isinstance(lock, type(threading.Lock()) | type(threading.RLock()) | threading.Condition):
            yield lock


def test_a_forked_child_waits_for_no_lock_that_another_thread_held(bucket):
    """As one that streams may at that moment."""
    dataset = write_dataset(f"{bucket}/locks", {"train": [sample(n) for n in range(4)]})
    held, forked = threading.Event(), threading.Event()

    def hold():
        with ExitStack() as stack:
            for lock in module_locks():
                stack.enter_context(lock)
            held.set()
            forked.wait()

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    child = multiprocessing.get_context("fork").Process(target=read_all, args=(dataset,))
    child.start()
    forked.set()
    other.join()
    child.join(20)
    ended = child.exitcode
    child.kill()
    assert ended == 0


def read_all(dataset):
    assert len(list(SampleReader(dataset.root, dataset.index("train")).read(range(4)))) == 4
