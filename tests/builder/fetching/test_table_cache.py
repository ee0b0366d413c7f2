import logging
import os
import resource
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.commands.cli import main, make_source
from builder.commands.options import default_cache_folder, parse
from builder.fetching import log_once, table_cache
from builder.fetching.fetch import Inventory, RangeFile
from builder.fetching.table_cache import Cache, Content
from builder.fetching.zip_members import locate_members
from builder.sources import csv_tables
from builder.sources.csv_tables import read_table
from builder.sources.openimages.source import OpenImages
from demo.scenes import SceneTruth
from shards.common.errors import StorageError
from shards.storage.location import Location
from shards.storage.reads import Description
from tests.builder.builds import build, mirror, quotas, tree

COLUMNS = {"ImageID": "string", "LabelName": "string", "XMin": "float64"}
PEOPLE, CARS = ({"LabelName": pa.array([label])} for label in ("/m/person", "/m/car"))
SCHEMA = pa.schema([("number", pa.int64())])


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"))


@pytest.fixture
def table(tmp_path: Path) -> Location:
    location = Location(str(tmp_path / "t.csv"))
    write_table(location, 1000)
    return location


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "builder")


def write_table(location: Location, rows: int, first: float = 0.0) -> None:
    labels = ["/m/person", "/m/car", "/m/dog", ""]
    lines = [f"{n:016x},{labels[n % 4]},{first if n == 0 else n / rows},x" for n in range(rows)]
    location.write("\n".join(["ImageID,LabelName,XMin,More", *lines, ""]).encode())


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs of the tables and zip directories that are read from the source."""
    urls, real = list[str](), RangeFile.__init__

    def recording(file: RangeFile, location: Location, *arguments: Any) -> None:
        urls.append(location.url)
        real(file, location, *arguments)

    monkeypatch.setattr(RangeFile, "__init__", recording)
    return urls


def only_file(cache: Cache) -> Path:
    [path] = Path(cache.folder).iterdir()
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_other_rows_of_a_cached_table_come_from_the_cache(
    table: Location, cache: Cache, opened: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    plain = [read_table(table, COLUMNS, where) for where in (PEOPLE, CARS)]
    assert read_table(table, COLUMNS, PEOPLE, cache=cache).equals(plain[0])
    opened.clear()
    caplog.clear()
    log_once._logged.clear()
    assert read_table(table, COLUMNS, PEOPLE, cache=cache).equals(plain[0])
    assert "from the cache" not in caplog.text  # this process has written it
    caplog.clear()
    log_once._logged.clear()
    cache = Cache(cache.folder)
    for where, expected in ((PEOPLE, plain[0]), (CARS, plain[1])):
        assert read_table(table, COLUMNS, where, cache=cache).equals(expected)
    assert not opened
    assert caplog.messages[0] == f"{table}: 1000 rows from the cache"
    assert caplog.messages[1] == f"{table}: 250 rows without ImageID or LabelName: left out"
    assert sum("from the cache" in message for message in caplog.messages) == 1  # not once per read
    few = {"ImageID": "string", "LabelName": "string"}
    assert read_table(table, few, PEOPLE, cache=cache).column_names == list(few)
    assert len(list(Path(cache.folder).iterdir())) == 2  # other columns are in another file


def test_row_groups_have_the_stated_size_and_dictionaries(
    table: Location, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(table_cache, "ROWS", 1000)
    write_table(table, 4500)
    expected = read_table(table, COLUMNS, PEOPLE)
    for _ in range(2):  # from the source, and from the cache
        assert read_table(table, COLUMNS, PEOPLE, cache=cache).equals(expected)
    groups = [pq.ParquetFile(only_file(cache)).metadata.row_group(n) for n in range(5)]
    assert sum(group.num_rows for group in groups) == 4500
    assert all(1000 <= group.num_rows < 1200 for group in groups[:-1])
    label = groups[0].column(1)
    assert (label.compression, label.has_dictionary_page) == ("ZSTD", True)
    assert "PLAIN" not in label.encodings[1:]


def test_files_are_named_without_secrets_of_the_url_and_their_state_distinguishes_versions() -> None:
    secret = "https://user:hunter2@host/v5/t.csv?X-Amz-Signature=hunter2#hunter2"
    names = [Content(Location(url), Description(5), "rows", SCHEMA).file_name for url in (secret, "https://h/v5/t.csv")]
    assert "hunter2" not in names[0]
    assert names[0].startswith("t.csv-")
    assert names[0] != names[1]
    versions = [Description(5, '"abc"', "now"), Description(5, '"abd"', "now"), Description(5, "", "Mon")]
    versions += [Description(5, "", "Tue"), Description(5), Description(6), Description(5, '"abc"', "later")]
    states = [Content(Location("/t.csv"), version, "", SCHEMA).state for version in versions]
    assert len(set(states)) == len(versions) - 1
    assert states[0] == states[-1]


def test_a_changed_source_is_read_again_or_an_error_if_it_is_being_read(
    table: Location, bucket: str, cache: Cache, opened: list[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for location in (table, Location(f"s3://{bucket}/t.csv")):
        write_table(location, 1000)
        for _ in range(2):
            assert read_table(location, COLUMNS, PEOPLE, cache=cache)["XMin"][0].as_py() == 0.0
        assert opened.count(location.url) == 1
        before = Inventory()
        before.load([location])
        write_table(location, 1000, first=0.5)  # of the same length: the time of change or the ETag differs
        if location.is_local:
            os.utime(location.path, (1, 1))
        with pytest.raises(StorageError, match="was replaced while it was being read"):
            read_table(location, COLUMNS, PEOPLE, cache=Cache(str(tmp_path / "empty")), inventory=before)
        assert not list((tmp_path / "empty").iterdir())
        assert read_table(location, COLUMNS, PEOPLE, cache=cache)["XMin"][0].as_py() == 0.5
        assert f"{location}: has changed since it was cached" in caplog.text
    assert len(list(Path(cache.folder).iterdir())) == 2


def test_a_damaged_file_causes_one_warning_and_is_read_again(
    table: Location, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever byte is wrong, the rows are right."""
    write_table(table, 40)
    expected = read_table(table, COLUMNS, PEOPLE, cache=cache)
    path = only_file(cache)
    whole = path.read_bytes()
    state = Content(table, Inventory().of(table), "", SCHEMA).state
    other_columns = pa.table({"ImageID": ["x"]}).replace_schema_metadata({table_cache.STATE_KEY: state.encode()})
    pq.write_table(other_columns, path)
    damaged = [path.read_bytes(), *(whole[:cut] for cut in (0, 3, 100, len(whole) - 1))]
    damaged += [whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :] for at in range(0, len(whole), 11)]
    for data in damaged:
        path.write_bytes(data)
        caplog.clear()
        assert read_table(table, COLUMNS, PEOPLE, cache=cache).equals(expected)
        assert sum(f"{path}: damaged, deleted" in message for message in warnings(caplog)) <= 1
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_causes_one_warning(
    tmp_path: Path, table: Location, caplog: pytest.LogCaptureFixture
) -> None:
    write_table(table, 20_000)
    expected = read_table(table, COLUMNS, CARS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Below a file; and with a limit on the size of files: writing fails halfway, with a real error of the system.
    for folder, limit in ((tmp_path / "t.csv" / "cache", soft), (tmp_path / "cache", 20_000)):
        caplog.clear()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            for _ in range(2):
                assert read_table(table, COLUMNS, CARS, cache=Cache(str(folder))).equals(expected)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        [warning] = warnings(caplog)
        assert "the cache cannot be written" in warning
        assert "--cache" in warning
        assert not list(folder.glob("*"))


def test_concurrent_writers_of_a_file_do_not_disturb_each_other(cache: Cache) -> None:
    content = Content(Location("/t.csv"), Description(1), "numbers", SCHEMA)
    parts = [pa.table({"number": pa.array([n])}, schema=SCHEMA) for n in range(3)]
    first = cache.keep(content, parts)
    next(first)
    other = threading.Thread(target=lambda: list(cache.keep(content, parts)))
    other.start()
    other.join()
    assert cache.read(content, list) == [pa.concat_tables(parts)]
    path = Path(cache.folder, content.file_name)
    path.unlink()  # as another process does with a file that it finds damaged
    assert list(first) == parts[1:]
    assert cache.read(content, list) == [pa.concat_tables(parts)]
    assert only_file(cache) == path


def test_unfinished_files_are_deleted_after_a_day_and_downloads_after_a_week(table: Location, cache: Cache) -> None:
    os.makedirs(cache.folder)
    ages = {"old.tmp": 2, "young.tmp": 0, "old.part": 8, "young.part": 2}  # days
    for name, days in ages.items():
        path = Path(cache.folder, name)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - days * 24 * 3600,) * 2)
    read_table(table, COLUMNS, PEOPLE, cache=cache)
    assert {path.name for path in Path(cache.folder).iterdir()} >= {"young.tmp", "young.part"}
    assert not list(Path(cache.folder).glob("old.*"))


def test_zip_directories_are_cached(tmp_path: Path, cache: Cache, opened: list[str]) -> None:
    path, location = tmp_path / "m.zip", Location(str(tmp_path / "m.zip"))
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(50):
            archive.writestr(f"{number}.png", bytes(number))
    plain = locate_members({location: ["3.png", "40.png", "none"]})
    assert locate_members({location: ["7.png"]}, cache=cache)["7.png"].size == 7
    opened.clear()
    assert locate_members({location: ["3.png", "40.png", "none"]}, cache=cache) == plain
    assert not opened
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("3.png", b"another")
    assert locate_members({location: ["3.png"]}, cache=cache)["3.png"].size == 7


@pytest.mark.parametrize(("base", "parent"), [("/var/x", "/var/x"), ("", "/me/.cache"), ("relative", "/me/.cache")])
def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, base: str, parent: str) -> None:
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert default_cache_folder() == f"{parent}/maskstream"


def test_a_build_of_other_classes_reads_no_table_again(
    scenes: SceneTruth, tmp_path: Path, cache: Cache, opened: list[str]
) -> None:
    plain = mirror(scenes)
    scope = quotas(("Person", "Car"), 100, 0)
    build(replace(plain, cache=cache), scope, Location(str(tmp_path / "first")))
    first = set(opened)
    assert {url[-4:] for url in first} >= {".csv", ".zip"}
    opened.clear()
    other = scope | {"class_names": ("Car", "Traffic light")}
    build(replace(plain, cache=cache), other, Location(str(tmp_path / "cached")))
    assert not first & set(opened)
    assert not any(url.endswith(".csv") for url in opened)
    build(plain, other, Location(str(tmp_path / "plain")))
    assert tree(tmp_path / "cached") == tree(tmp_path / "plain")


def test_the_options_of_the_command(
    scenes: SceneTruth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    arguments = ["--classes", "Car", "--per-class", "3", "--eval-per-class", "0", "--dry-run"]
    arguments += ["--images", str(scenes.images), "--annotations", str(scenes.annotations)]
    for more, lasting in (([], True), (["--no-cache"], False)):
        source = make_source(parse([*arguments, *more]), str(tmp_path))
        assert isinstance(source, OpenImages)
        assert source.cache.lasting == lasting  # without a folder that stays, no download can be resumed
    assert main([*arguments, "--no-cache"]) == 0
    folder = tmp_path / "home" / "maskstream"
    assert not folder.exists()
    assert main(arguments) == 0
    assert any(folder.glob("*.parquet"))
    moved = folder.rename(tmp_path / "moved")
    caplog.clear()
    assert main([*arguments, "--cache", str(moved)]) == 0
    assert sum("rows from the cache" in message for message in caplog.messages) >= 4
