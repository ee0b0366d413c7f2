"""Tables are downloaded by several ranges at once, and an interrupted download is resumed, byte for byte."""

import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from builder.fetching import download
from builder.fetching.download import Download
from builder.fetching.fetch import Inventory
from builder.fetching.partial_file import PartialFile
from builder.fetching.table_cache import Cache, Content
from builder.sources.csv_tables import read_table
from demo.s3proxy import S3Proxy, Seen
from demo.s3server import S3Server
from shards.commands import progress
from shards.common.errors import StorageError, UserError
from shards.storage.location import Location
from shards.storage.reads import Description
from tests.support import REPOSITORY, Proxied

DATA = bytes(range(256)) * 40  # 10,240 bytes: a head of 1000, and ten ranges
OBJECT = Location("s3://bucket/t.csv?secret")
ONE, OTHER = Description(len(DATA), '"one"'), Description(len(DATA), '"other"')
COLUMNS = {"ImageID": "string", "XMin": "float64"}


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("HEAD_BYTES", "RANGE_BYTES"):
        monkeypatch.setattr(download, name, 1000)
    monkeypatch.setattr(download, "RANGES_AHEAD", 3)
    caplog.set_level(logging.INFO, "builder")


class Store:
    """Stands for `RangeFile._fetch`: records the starts of ranges, and fails from one on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.starts: list[int] = []
        self.error: Exception | None = None
        self.fails_at = len(DATA)
        monkeypatch.setattr(Download, "_fetch", lambda file, start, end: self.fetch(start, end))

    def fetch(self, start: int, end: int) -> bytes:
        self.starts.append(start)
        if self.error is not None and end > self.fails_at:
            raise self.error
        return DATA[start:end]

    def fail(self, at: int, error: Exception) -> None:
        self.fails_at, self.error, self.starts = at, error, []

    def work(self) -> None:
        self.error, self.starts = None, []


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


@pytest.fixture
def opening(tmp_path: Path) -> Callable[[Description], Callable[[], PartialFile | None]]:
    (tmp_path / "cache").mkdir()  # as the writer of the table does before its download
    cache = Cache(str(tmp_path / "cache"))
    return lambda version: partial(cache.open_partial, Content(OBJECT, version, "", pa.schema([])))


def read(version: Description, open_partial: Callable[[], PartialFile | None] = lambda: None) -> bytes:
    with Download(OBJECT, version, open_partial) as file:
        return file.read()


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*"))


def test_ranges_are_read_at_once_in_order_and_no_further_ahead_than_stated(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3, timeout=20)
    real = store.fetch

    def waiting(start: int, end: int) -> bytes:
        data = real(start, end)
        if 0 < start <= 3000:
            together.wait()  # breaks unless three are in flight
        return data

    monkeypatch.setattr(store, "fetch", waiting)
    with Download(OBJECT, ONE) as file:
        assert store.starts == [0]
        assert file.read(1500) == DATA[:1500]
        assert max(store.starts) <= 4000  # the second is being read, three are ahead of it
        assert file.read() == DATA[1500:]
        assert file.read(5) == b""
    assert sorted(store.starts) == [0, *range(1000, len(DATA), 1000)]


def test_a_file_that_is_closed_early_ends_its_requests(store: Store) -> None:
    with Download(OBJECT, ONE) as file:
        file.read(1500)
    assert len(store.starts) <= 5


def test_closing_does_not_wait_for_ranges_on_their_way(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    started, finish = threading.Event(), threading.Event()
    real = store.fetch

    def stuck(start: int, end: int) -> bytes:
        if start:
            started.set()
            finish.wait()
        return real(start, end)

    monkeypatch.setattr(store, "fetch", stuck)
    file = Download(OBJECT, ONE)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(file.read, 1500)
        started.wait()
        file.close()
        with pytest.raises(CancelledError):
            reading.result()
    finish.set()
    assert file.closed


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_small_object_is_one_range_without_a_file(
    store: Store, opening: Callable[..., Callable[[], PartialFile | None]], tmp_path: Path, size: int
) -> None:
    assert read(Description(size, '"one"'), opening(ONE)) == DATA[:size]
    assert len(store.starts) == 1
    assert not kept(tmp_path)


def test_an_interrupted_download_resumes_where_it_was_and_only_for_the_same_version(
    store: Store,
    opening: Callable[..., Callable[[], PartialFile | None]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.fail(4500, StorageError("the network is gone"))
    with pytest.raises(StorageError, match="gone"):
        read(ONE, opening(ONE))
    [path] = kept(tmp_path)
    assert "secret" not in path.name
    left = path.read_bytes()

    store.work()
    assert read(ONE, opening(ONE)) == DATA
    assert sorted(store.starts) == [0, *range(4000, len(DATA), 1000)]
    assert "resuming a download: 0.0 of 0.0 MB are here" in caplog.text

    path.write_bytes(left)
    store.work()
    assert read(OTHER, opening(OTHER)) == DATA
    assert sorted(store.starts) == [0, *range(1000, len(DATA), 1000)]
    assert left[:30] not in path.read_bytes()


def test_damage_of_what_was_kept_is_fetched_again(
    store: Store, opening: Callable[..., Callable[[], PartialFile | None]], tmp_path: Path
) -> None:
    """Whichever byte is wrong, and wherever the file ends."""
    store.fail(4500, StorageError("gone"))
    with pytest.raises(StorageError):
        read(ONE, opening(ONE))
    [path] = kept(tmp_path)
    left = path.read_bytes()
    store.work()
    damaged = [left[:cut] for cut in range(0, len(left), 97)] + [left + b"\0" * 50, left + left[-1016:], b"x" * 5000]
    damaged += [left[:at] + bytes([left[at] ^ 0x41]) + left[at + 1 :] for at in range(0, len(left), 97)]
    for data in damaged:
        path.write_bytes(data)
        assert read(ONE, opening(ONE)) == DATA


def test_wrong_contents_are_not_kept(
    store: Store, opening: Callable[..., Callable[[], PartialFile | None]], tmp_path: Path
) -> None:
    for error, stays in ((UserError("not a table"), False), (StorageError("gone"), True), (KeyboardInterrupt(), True)):
        file = Download(OBJECT, ONE, opening(ONE))
        assert file.read(3000) == DATA[:3000]
        file.__exit__(type(error), error, None)
        assert file.closed
        assert bool(kept(tmp_path)) == stays


def test_downloads_without_a_strong_etag_a_lasting_folder_or_space_keep_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    for folder, lasting, etag in (("", True, '"a"'), ("c", False, '"a"'), ("c", True, ""), ("c", True, 'W/"a"')):
        cache = Cache(str(tmp_path / folder) if folder else "", lasting=lasting)
        assert cache.open_partial(Content(OBJECT, Description(5, etag, "now"), "", pa.schema([]))) is None
    content = Content(OBJECT, Description(5000, '"a"'), "", pa.schema([]))
    assert Cache(str(tmp_path / "c" / "missing")).open_partial(content) is None
    for free, keeps in ((9999, False), (10_000, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert not list((tmp_path / "c").iterdir())
        assert (Cache(str(tmp_path / "c")).open_partial(content) is not None) == keeps


def test_what_was_kept_stays_if_the_next_process_ends_at_once_and_on_a_disk_that_it_has_filled(
    store: Store,
    opening: Callable[..., Callable[[], PartialFile | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = 2 * len(DATA)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: SimpleNamespace(free=free - sum(path.stat().st_size for path in kept(tmp_path)))
    )
    store.fail(4500, StorageError("gone"))
    with pytest.raises(StorageError):
        read(ONE, opening(ONE))
    [left] = kept(tmp_path)
    before = left.read_bytes()
    store.work()
    with Download(OBJECT, ONE, opening(ONE)) as file:
        assert file.read(500) == DATA[:500]
    assert left.read_bytes() == before
    store.starts = []
    assert read(ONE, opening(ONE)) == DATA
    assert sorted(store.starts) == [0, *range(4000, len(DATA), 1000)]


def test_two_processes_do_not_share_a_file(
    store: Store, opening: Callable[..., Callable[[], PartialFile | None]], tmp_path: Path
) -> None:
    with Download(OBJECT, ONE, opening(ONE)) as first:
        first.read(2500)
        assert read(ONE, opening(ONE)) == DATA  # keeps nothing of its own
        assert first.read() == DATA[2500:]
    [path] = kept(tmp_path)
    assert path.stat().st_size > len(DATA) - 1000
    other = PartialFile.open(str(path), "a version")
    assert other is not None
    path.unlink()  # as a process does that has read the whole table
    other.close(keep=True)
    assert not kept(tmp_path)


def test_a_full_disk_ends_keeping_and_not_the_download(
    store: Store, opening: Callable[..., Callable[[], PartialFile | None]], tmp_path: Path
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        assert read(ONE, opening(ONE)) == DATA
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not kept(tmp_path)


def test_a_download_reports_its_progress_without_the_query(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    read(ONE)
    lines = [message for message in caplog.messages if message.startswith("t.csv: ")]
    assert len(lines) == 1 + 10  # the head and ten ranges
    assert all(" MB/s, " in line for line in lines)
    assert "secret" not in "".join(lines)


@pytest.fixture
def table(bucket: str) -> Location:
    location = Location(f"s3://{bucket}/t.csv")
    location.write(b"".join([b"ImageID,XMin\n", *(b"%08d,0.5\n" % n for n in range(2000))]))  # 26 kB
    return location


KILLED = """
from builder.fetching import download
from builder.fetching.table_cache import Cache
from builder.sources.csv_tables import read_table
from shards.storage.location import Location
import sys
download.HEAD_BYTES = download.RANGE_BYTES = 1000
read_table(Location(sys.argv[1]), {"ImageID": "string", "XMin": "float64"}, {}, cache=Cache(sys.argv[2]))
"""


def test_a_killed_download_of_a_table_is_resumed(
    s3: S3Server, table: Location, tmp_path: Path, proxied: Proxied, caplog: pytest.LogCaptureFixture
) -> None:
    counted = itertools.count(1)

    def kill(seen: Seen) -> None:
        if next(counted) == 20:
            os.kill(process.pid, signal.SIGKILL)

    cache = Cache(str(tmp_path / "cache"))
    with S3Proxy(s3.endpoint_url, on_request=kill) as proxy:
        command = [sys.executable, "-c", KILLED, table.url, cache.folder]
        process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **proxy.environment()})
        assert process.wait() == -signal.SIGKILL
    assert {path.suffix for path in kept(tmp_path)} == {".part", ".tmp"}
    for path in kept(tmp_path):
        assert path.stat().st_size < 20_000

    with proxied() as proxy:
        found = read_table(table, COLUMNS, {}, cache=cache)
        assert "rows from the cache" not in caplog.text
        assert proxy.counters.requests["GET"] < 20  # of 28
        assert found["ImageID"].to_pylist() == [f"{n:08}" for n in range(2000)]
        assert f"{table}: 0.0 MB in " in caplog.text
        assert not [path for path in kept(tmp_path) if path.suffix == ".part"]
        assert read_table(table, COLUMNS, {}, cache=Cache(cache.folder)).equals(found)
        assert f"{table}: 2000 rows from the cache" in caplog.text


def test_a_table_that_is_replaced_while_it_is_downloaded_is_an_error(table: Location) -> None:
    with Download(table, Inventory().of(table)) as file:
        assert file.read(1500)
        table.write(b"ImageID,XMin\n" + b"another,1\n" * 3000)
        with pytest.raises(StorageError, match="was replaced while it was being read"):
            file.read()
