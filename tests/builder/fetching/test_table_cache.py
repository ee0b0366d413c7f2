import json
import logging
import multiprocessing
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.commands.cli import main
from builder.fetching import table_cache as cache_module
from builder.fetching import zip_members as maskzip
from builder.fetching.cache_folder import default_cache_folder
from builder.fetching.fetch import Inventory
from builder.fetching.table_cache import Cache, state_of
from builder.fetching.zip_members import locate_members
from builder.sources import csv_tables as tables
from builder.sources.csv_tables import read_table
from builder.sources.openimages.layout import source_location
from builder.sources.openimages.source import OpenImages
from demo.scenes import SceneTruth
from shards.common.errors import StorageError
from shards.storage.location import Location
from shards.storage.ranges import Description
from tests.builder.builds import build, quotas
from tests.support import REPOSITORY

COLUMNS = {"ImageID": "string", "LabelName": "string", "XMin": "float64"}
PEOPLE, CARS = ({"LabelName": pa.array([label])} for label in ("/m/person", "/m/car"))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"))


@pytest.fixture
def table(tmp_path: Path) -> Location:
    location = Location(str(tmp_path / "t.csv"))
    write_table(location, 1000)
    return location


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "builder")
    monkeypatch.setattr(cache_module, "_unwritable", set())
    monkeypatch.setattr(tables, "_told", set())


def write_table(location: Location, rows: int, first: float = 0.0) -> None:
    labels = ["/m/person", "/m/car", "/m/dog", ""]
    lines = [f"{n:016x},{labels[n % 4]},{first if n == 0 else n / rows},x" for n in range(rows)]
    location.write("\n".join(["ImageID,LabelName,XMin,More", *lines, ""]).encode())


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs of what is read from the source, as tables and zip directories are opened."""
    urls: list[str] = []
    for module in (tables, maskzip):
        real = module.RangeFile

        def recording(location: Location, *arguments: Any, real: Any = real) -> Any:
            urls.append(location.url)
            return real(location, *arguments)

        monkeypatch.setattr(module, "RangeFile", recording)
    return urls


def only_file(cache: Cache) -> Path:
    [path] = Path(cache.folder).iterdir()
    return path


def test_other_rows_of_a_table_that_was_read_once_come_from_the_cache(
    table: Location, cache: Cache, opened: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    plain = [read_table(table, COLUMNS, where) for where in (PEOPLE, CARS)]
    opened.clear()
    assert read_table(table, COLUMNS, PEOPLE, cache=cache).equals(plain[0])
    assert set(opened) == {table.url}
    opened.clear()
    caplog.clear()
    tables._told.clear()
    for where, expected in ((PEOPLE, plain[0]), (CARS, plain[1])):
        assert read_table(table, COLUMNS, where, cache=cache).equals(expected)
    assert not opened
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == f"{table}: 1000 rows from the cache"
    assert told[1] == f"{table}: 250 rows without ImageID or LabelName: left out"


def test_a_row_group_is_of_the_stated_size_and_labels_are_a_dictionary(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "ROWS", 1000)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 4096)
    location = Location(str(tmp_path / "t.csv"))
    write_table(location, 4500)
    expected = read_table(location, COLUMNS, PEOPLE)
    assert read_table(location, COLUMNS, PEOPLE, cache=cache).equals(expected)
    file = pq.ParquetFile(only_file(cache))
    assert {file.metadata.row_group(n).num_rows for n in range(file.num_row_groups - 1)} == {1000}
    label = file.metadata.row_group(0).column(1)
    assert label.compression == "ZSTD"
    assert label.has_dictionary_page
    assert "PLAIN" not in label.encodings[1:]
    assert pa.types.is_dictionary(file.schema_arrow.field("LabelName").type)
    assert read_table(location, COLUMNS, PEOPLE, cache=cache).equals(expected)


def test_another_set_of_columns_is_another_file(table: Location, cache: Cache) -> None:
    read_table(table, COLUMNS, PEOPLE, cache=cache)
    few = {"ImageID": "string", "LabelName": "string"}
    assert read_table(table, few, PEOPLE, cache=cache).column_names == list(few)
    assert len(list(Path(cache.folder).iterdir())) == 2


def test_a_changed_source_is_read_anew_and_takes_the_place_of_the_old(
    table: Location, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    read_table(table, COLUMNS, PEOPLE, cache=cache)
    size = table.size()
    write_table(table, 1000, first=0.5)  # the same length: the time of the change tells
    os.utime(table.path, (1, 1))
    assert table.size() == size
    assert read_table(table, COLUMNS, PEOPLE, cache=cache)["XMin"][0].as_py() == 0.5
    assert "has changed since it was cached" in caplog.text
    only_file(cache)


@pytest.mark.parametrize(
    ("told", "state"),
    [
        (Description(5, '"abc"', "now"), {"size": 5, "etag": '"abc"'}),
        (Description(5, "", "Mon"), {"size": 5, "changed": "Mon"}),
        (Description(5), {"size": 5}),
    ],
)
def test_what_tells_two_versions_apart(told: Description, state: dict[str, Any]) -> None:
    assert json.loads(state_of(told)) == state


def test_an_object_of_another_etag_is_read_anew(bucket: str, cache: Cache, opened: list[str]) -> None:
    location = Location(f"s3://{bucket}/t.csv")
    write_table(location, 100)
    read_table(location, COLUMNS, PEOPLE, cache=cache)
    opened.clear()
    assert read_table(location, COLUMNS, PEOPLE, cache=cache)["XMin"][0].as_py() == 0.0
    assert not opened
    write_table(location, 100, first=0.5)  # as long as before
    assert read_table(location, COLUMNS, PEOPLE, cache=cache)["XMin"][0].as_py() == 0.5


def test_a_source_that_is_replaced_while_it_is_read_is_an_error_and_not_kept(
    table: Location, bucket: str, cache: Cache
) -> None:
    remote = Location(f"s3://{bucket}/t.csv")
    for location in (table, remote):
        write_table(location, 100)
        inventory = Inventory()
        inventory.ask([location])
        write_table(location, 100, first=0.5)  # as long as before
        if location.is_local:
            os.utime(location.path, (1, 1))
        with pytest.raises(StorageError, match="was replaced while it was being read"):
            read_table(location, COLUMNS, PEOPLE, cache=cache, inventory=inventory)
        assert not Path(cache.folder).exists() or not list(Path(cache.folder).iterdir())


def test_a_damaged_file_is_told_once_and_read_anew(
    tmp_path: Path, table: Location, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    """Every byte matters: whichever is wrong, the rows are right in the end."""
    write_table(table, 40)
    expected = read_table(table, COLUMNS, PEOPLE, cache=cache)
    path = only_file(cache)
    whole = path.read_bytes()
    damaged = [whole[:cut] for cut in (0, 3, 100, len(whole) - 1)]
    damaged += [whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    for data in damaged:
        path.write_bytes(data)
        caplog.clear()
        assert read_table(table, COLUMNS, PEOPLE, cache=cache).equals(expected)
        told = [
            record
            for record in caplog.records
            if record.levelno == logging.WARNING and str(path) in record.getMessage()
        ]
        assert len(told) <= 1
    assert path.read_bytes() == whole


def test_a_file_of_another_shape_is_discarded(table: Location, cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    expected = read_table(table, COLUMNS, PEOPLE, cache=cache)
    path = only_file(cache)
    metadata = {b"source": state_of(Inventory().of(table)).encode()}
    pq.write_table(pa.table({"ImageID": ["x"]}).replace_schema_metadata(metadata), path)
    assert read_table(table, COLUMNS, PEOPLE, cache=cache).equals(expected)
    assert f"{path}: discarded" in caplog.text


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, table: Location, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = Cache(str(tmp_path / "file" / "cache"))
    expected = read_table(table, COLUMNS, PEOPLE)
    caplog.clear()
    for _ in range(3):
        assert read_table(table, COLUMNS, PEOPLE, cache=cache).equals(expected)
    told = [record for record in caplog.records if "cache cannot be written" in record.getMessage()]
    assert len(told) == 1
    assert "--cache" in told[0].getMessage()


def test_a_full_disk_does_not_fail_the_build(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails halfway, with real errors of the system."""
    location = Location(str(tmp_path / "t.csv"))
    write_table(location, 20_000)
    code = f"""
import logging, resource, sys
import pyarrow as pa
from builder.fetching.table_cache import Cache
from builder.sources.csv_tables import read_table
from shards.storage.location import Location
logging.basicConfig(stream=sys.stderr, level=logging.INFO)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
cache = Cache({str(tmp_path / "cache")!r})
for _ in range(2):
    rows = read_table(Location({location.url!r}), {COLUMNS!r}, {{"LabelName": pa.array(["/m/car"])}}, cache=cache)
    print(rows.num_rows)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.split() == ["5000", "5000"]
    assert done.stderr.count("cache cannot be written") == 1
    assert not list((tmp_path / "cache").iterdir())


def read_many_times(url: str, folder: str, times: int) -> list[int]:
    return [read_table(Location(url), COLUMNS, PEOPLE, cache=Cache(folder)).num_rows for _ in range(times)]


def test_many_processes_at_once_do_not_break_each_other(table: Location, cache: Cache) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        jobs = [pool.apply_async(read_many_times, (table.url, cache.folder, 20)) for _ in range(3)]
        for _ in range(10):
            for path in Path(cache.folder).glob("*.parquet"):
                path.unlink(missing_ok=True)  # so that all write again and again
        assert [job.get(60) for job in jobs] == [[250] * 20] * 3
    assert only_file(cache).suffix == ".parquet"


def test_what_killed_processes_leave_is_removed_after_a_day(table: Location, cache: Cache) -> None:
    os.makedirs(cache.folder)
    old, young = Path(cache.folder, "old.tmp"), Path(cache.folder, "young.tmp")
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    read_table(table, COLUMNS, PEOPLE, cache=cache)
    assert not old.exists()
    assert young.exists()


def test_zip_directories_are_kept(
    tmp_path: Path, cache: Cache, opened: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(50):
            archive.writestr(f"{number}.png", bytes(number))
    location = Location(str(path))
    plain = locate_members({location: ["3.png", "40.png", "none"]})
    assert locate_members({location: ["7.png"]}, cache=cache)["7.png"].size == 7
    opened.clear()
    assert locate_members({location: ["3.png", "40.png", "none"]}, cache=cache) == plain
    assert not opened
    assert maskzip.directory_is_cached(location, cache)
    assert not maskzip.directory_is_cached(location, None)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("3.png", b"another")
    assert locate_members({location: ["3.png"]}, cache=cache)["3.png"].size == 7


def test_no_secret_of_a_url_lands_in_the_cache(cache: Cache) -> None:
    secret = Location("https://user:hunter2@host/v5/t.csv?X-Amz-Signature=hunter2#hunter2")
    entry = cache.entry(secret, Description(5), "rows")
    assert "hunter2" not in entry.path
    assert os.path.basename(entry.path).startswith("t.csv-")
    assert entry.path != cache.entry(Location("https://host/v5/t.csv"), Description(5), "rows").path


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for base, folder in (
        ("/var/x", "/var/x/maskstream"),
        ("", "/home/me/.cache/maskstream"),
        ("relative", "/home/me/.cache/maskstream"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert default_cache_folder() == folder


def tree(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix == ".tar":
            yield str(path.relative_to(root)), path.read_bytes()


def test_a_second_build_of_other_classes_reads_no_table_and_no_directory_again(
    scenes: SceneTruth, tmp_path: Path, cache: Cache, opened: list[str]
) -> None:
    plain = OpenImages(source_location(str(scenes.images)), source_location(str(scenes.annotations)))
    cached = replace(plain, cache=cache)
    choice = quotas(("Person", "Car"), 100, 0)
    build(cached, choice, Location(str(tmp_path / "first")))
    first = set(opened)
    assert any(url.endswith(".csv") for url in first)
    assert any(url.endswith(".zip") for url in first)
    opened.clear()
    other = choice | {"class_names": ("Car", "Traffic light")}
    build(cached, other, Location(str(tmp_path / "second")))
    build(cached, choice, Location(str(tmp_path / "third")))
    assert not first & set(opened)
    assert not any(url.endswith(".csv") for url in opened)
    build(plain, other, Location(str(tmp_path / "plain")))
    assert dict(tree(tmp_path / "second")) == dict(tree(tmp_path / "plain"))
    assert dict(tree(tmp_path / "third")) == dict(tree(tmp_path / "first"))


def test_the_options_of_the_command(
    scenes: SceneTruth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    arguments = ["--classes", "Car", "--per-class", "3", "--eval-per-class", "0", "--workers", "1"]
    arguments += ["--images", str(scenes.images), "--annotations", str(scenes.annotations)]
    assert main([*arguments, "--out", str(tmp_path / "a"), "--no-cache"]) == 0
    assert not (tmp_path / "home").exists()
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 0
    assert any((tmp_path / "home" / "maskstream").glob("*.parquet"))
    folder = tmp_path / "kept"
    assert main([*arguments, "--out", str(tmp_path / "c"), "--cache", str(folder)]) == 0
    assert any(folder.glob("*.parquet"))
    caplog.clear()
    assert main([*arguments, "--out", str(tmp_path / "d"), "--cache", str(folder)]) == 0
    assert sum("rows from the cache" in message for message in caplog.messages) >= 4
    assert len({tuple(tree(tmp_path / name)) for name in "abcd"}) == 1
    with pytest.raises(SystemExit):
        main([*arguments, "--no-cache", "--cache", str(folder)])
