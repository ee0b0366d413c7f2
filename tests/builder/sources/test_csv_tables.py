import csv
import io
import logging
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builder.fetching import log_once
from builder.fetching.table_cache import Cache
from builder.sources import csv_tables
from builder.sources.csv_tables import leave_out, read_table
from shards.common.errors import StorageError, UserError
from shards.storage.location import Location

COLUMNS = {"ImageID": "string", "LabelName": "string", "XMin": "float64"}
LABELS = {"LabelName": pa.array(["/m/a", "/m/b"])}
VALID = b"ImageID,Source,LabelName,XMin\n" + b"".join(
    b"%04x,x click,/m/%c,0.%d\n" % (n, b"abc"[n % 3], n * 7) for n in range(12)
)
HEADER, FIRST, *_ = LINES = VALID.splitlines()
MARK = b"\xef\xbb\xbf"


def write(path: Path, data: bytes) -> Location:
    path.write_bytes(data)
    return Location(str(path))


def test_rows_are_filtered_over_many_blocks_and_other_columns_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 5000)
    lines = [f"{n:016x},x,{'/m/a' if n % 10 == 0 else '/m/c'},{n / 1000},{'c' * 20}\n" for n in range(1000)]
    location = write(tmp_path / "t.csv", "".join(["ImageID,Source,LabelName,XMin,Clicks\n", *lines]).encode())
    table = read_table(location, COLUMNS, LABELS)
    assert table.column_names == list(COLUMNS)
    assert table["ImageID"].to_pylist() == [f"{n:016x}" for n in range(0, 1000, 10)]
    nothing = read_table(location, COLUMNS, {"LabelName": pa.array(["/m/d"])})
    assert nothing.num_rows == 0
    assert nothing.schema == table.schema
    with pytest.raises(StorageError, match=r"gone\.csv"):
        read_table(Location(str(tmp_path / "gone.csv")), COLUMNS, LABELS)


@pytest.mark.parametrize("many", [0, 10_000])
def test_few_and_many_values_keep_the_order(tmp_path: Path, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_tables, "GATHER_ROWS", 700)
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 2000)
    text = "ImageID,LabelName,XMin\n" + "".join(f"i{n},/m/{n % 3},{n}\n" for n in range(5000))
    images = [f"i{n}" for n in range(0, 5000, 4)] + [f"none{n}" for n in range(many)]
    where = {"LabelName": pa.array(["/m/0", "/m/2"]), "ImageID": pa.array(images)}
    table = read_table(write(tmp_path / "t.csv", text.encode()), COLUMNS, where)
    assert table["XMin"].to_pylist() == [n for n in range(0, 5000, 4) if n % 3 != 1]


def test_leave_out_warns_once_and_does_not_copy_good_blocks(caplog: pytest.LogCaptureFixture) -> None:
    blocks = [pa.table({"x": pa.array(numbers, pa.int64())}) for numbers in ([1, 2, 3], [4, -5, 6], [], [7])]
    where = Location("s3://bucket/t.csv")
    for _ in range(2):
        kept = leave_out(pa.concat_tables(blocks), lambda rows: pc.greater(rows["x"], 0), where, "below zero")
        assert kept["x"].to_pylist() == [1, 2, 3, 4, 6, 7]
    assert caplog.messages == ["s3://bucket/t.csv: 1 row below zero: left out"]
    first = kept["x"].chunk(0).buffers()[1]
    assert first.address == blocks[0]["x"].chunk(0).buffers()[1].address
    assert leave_out(blocks[2], lambda rows: np.zeros(0, bool), where, "none").num_rows == 0


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block", [64, 65, 66, 67, 1 << 20])
def test_line_ends_between_blocks_lose_no_row(
    tmp_path: Path, ends: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", block)
    lines = ["ImageID,LabelName,XMin", *(f"{n:03},/m/a,{n}" for n in range(200))]
    table = read_table(write(tmp_path / "t.csv", ends.join(lines).encode()), COLUMNS, LABELS)
    assert table["XMin"].to_pylist() == list(range(200))


def inserted(at: int, *lines: bytes) -> bytes:
    return b"\n".join([*LINES[:at], *lines, *LINES[at:], b""])


ERRORS = [
    (VALID.replace(b"XMin", b"X"), "there is no column XMin"),
    (VALID.replace(b",", b";"), "seems to be separated by ';'"),
    (VALID.replace(b",", b"\t"), r"seems to be separated by '\t'"),
    (b"\n".join(LINES[1:]), "there is no column ImageID"),
    (inserted(3, HEADER), "conversion error to double: invalid value 'XMin'"),
    (b"\n".join(line + b"," + line for line in LINES), "two columns ImageID"),
    (b"", "it is empty"),
    (MARK, "there is no column ImageID"),
    (b"\n\n\n", "there is no column ImageID"),
    (bytes(range(256)) * 40, ""),
    (b"\xff\xd8\xff\xe0" + b"\x00\x01" * 5000, "not a header"),
    (VALID.decode().encode("utf-16"), "not a header"),
    (HEADER + b"\n" + b"\x00\x8f\x13" * 99, "expected 4 columns, got 1"),
    (b",".join(LINES * 999), "longer than 65536 bytes"),
    (inserted(2, b"ff,x,/m/a"), "expected 4 columns, got 3"),
    (inserted(2, FIRST + b",1"), "expected 4 columns, got 5"),
    (VALID[:-9], "expected 4 columns, got"),
    (inserted(2, b"ff,x,/m/a,left"), "invalid value 'left'"),
    (inserted(2, b'ff,x,/m/a,"0,5"'), "invalid value '0,5'"),
    (inserted(2, b"\xe9" + FIRST), "invalid utf8"),
    (inserted(2, b'"' + FIRST), "csv"),
]
DAMAGED = [(*case, newlines) for newlines in (False, True) for case in ERRORS]
DAMAGED += [(inserted(2, b'ff,"x,/m/a,1', b'fe,x",/m/a,2'), "quoted values contain line ends", False)]


@pytest.mark.parametrize(("data", "reason", "newlines"), DAMAGED)
def test_damage_is_an_error_with_file_fault_and_remedy(
    tmp_path: Path, data: bytes, reason: str, newlines: bool
) -> None:
    location, cache = write(tmp_path / "t.csv", data), Cache(str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        read_table(location, COLUMNS, LABELS, newlines_in_values=newlines, cache=cache)
    message = str(caught.value)
    assert message.startswith(f"{location}: ")
    assert reason.lower() in message.lower()
    assert "--annotations" in message
    assert len(message) < 1000
    assert not list(Path(cache.folder).glob("*"))  # nothing of a damaged table is kept


# Read with the same rows as the undamaged table, but for those that the warning counts.
READABLE = [
    (VALID.replace(b"\n", b"\r\n"), ""),
    (VALID.replace(b"\n", b"\r"), ""),
    (VALID[:-1], ""),
    (b"\n\n".join([*LINES, b"", b"\r\n"]), ""),
    (MARK + VALID, ""),
    (b"\n".join(b'"' + line.replace(b",", b'","') + b'"' for line in LINES), ""),
    (VALID.replace(b",", b" , "), ""),
    (VALID.replace(b",x click,", b",\xe9,"), ""),  # a column that is not read
    (b"\n".join(b",".join(line.split(b",")[::-1]) for line in LINES), ""),
    (inserted(3, b",,,", b",,,"), "2 rows without ImageID or LabelName: left out"),
    (inserted(3, b"ff,x,,1"), "1 row without ImageID or LabelName: left out"),
]


@pytest.mark.parametrize("newlines", [False, True])
@pytest.mark.parametrize(("data", "warning"), READABLE)
def test_deviations_are_read_and_rows_that_are_left_out_are_counted(
    tmp_path: Path, data: bytes, warning: str, newlines: bool, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read_table(write(tmp_path / "clean.csv", VALID), COLUMNS, LABELS)
    assert expected.num_rows == 8
    location, cache = write(tmp_path / "t.csv", data), Cache(str(tmp_path / "cache"))
    for _ in ("from the source", "from the cache"):
        caplog.clear()
        log_once._logged.clear()
        assert read_table(location, COLUMNS, LABELS, newlines_in_values=newlines, cache=cache).equals(expected)
        warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert warnings == [f"{location}: {warning}"] * bool(warning)


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_header_without_rows_causes_a_warning(tmp_path: Path, end: bytes, caplog: pytest.LogCaptureFixture) -> None:
    location = write(tmp_path / "t.csv", HEADER + end)
    assert read_table(location, COLUMNS, LABELS).num_rows == 0
    assert caplog.messages == [f"{location}: has a header and no rows"]


def test_a_first_line_that_is_longer_than_a_block_is_an_error_and_not_a_table_without_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 16)
    data = VALID.replace(b"Source", b"Source" * 1000)
    with pytest.raises(UserError, match="not the expected CSV table"):
        read_table(write(tmp_path / "t.csv", data), COLUMNS, LABELS)


def test_values_with_line_ends_cause_a_warning_where_they_are_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    location = write(tmp_path / "t.csv", b'ImageID,Title\na1,one\na2,"a title\nof two lines"\n')
    columns = {"ImageID": "string", "Title": "string"}
    table = read_table(location, columns, {"ImageID": pa.array(["a2"])}, newlines_in_values=True)
    assert table["Title"].to_pylist() == ["a title\nof two lines"]
    [warning] = caplog.messages
    assert "4 lines make 3 rows" in warning


PIECES = [b",", b"\n", b"\r", b"\r\n", b'"', b'""', b'","', b";", b" ", b"\t", b"\xff", b"\0", b"nan", b",,,\n", b"1"]
PIECES += [MARK, b"\xc3\xa9", b"/m/a", b"ImageID", b"\n\n", b"-", b"e5", b"\x0b", *LINES[:3]]
# At each place a piece is inserted, or a number of bytes is deleted.
damage = st.lists(st.tuples(st.integers(0, len(VALID)), st.sampled_from(PIECES) | st.integers(1, 40)), max_size=4)


def read_independently(data: bytes) -> list[tuple[str, str, float | None]] | None:
    """The selected rows by the csv module; None if the data are not a table with these columns."""
    text = data.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
        header = [name.strip() for name in rows[0]]
        if any(len(row) != len(header) for row in rows) or any(header.count(name) != 1 for name in COLUMNS):
            return None
        kept = []
        for row in rows[1:]:
            image, label, x = (row[header.index(name)].strip(" \t\r\n\v\f") for name in COLUMNS)
            value = float(x) if x else None
            if label in ("/m/a", "/m/b"):
                kept.append((image, label, None if value is None or math.isnan(value) else value))
        return kept
    except (csv.Error, ValueError, IndexError):
        return None


@settings(max_examples=400)
@given(damage, st.sampled_from([48, 200, 1 << 20]))
@example([(40, b'"'), (70, b'"')], 1 << 20)
@example([(36, b'"'), (59, b'"')], 1 << 20)
def test_any_damage_is_an_error_or_read_as_the_standard_library_does(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bytes | int]], block: int
) -> None:
    data = VALID
    for at, what in steps:
        data = data[:at] + (what + data[at:] if isinstance(what, bytes) else data[at + what :])
    location = write(tmp_path_factory.getbasetemp() / "damaged.csv", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_tables, "BLOCK_BYTES", block)
        error = ""
        try:
            table = read_table(location, COLUMNS, LABELS)
        except UserError as raised:
            error = str(raised)
    if error:
        assert steps
        assert location.url in error
        return
    numbers = [None if x is None or math.isnan(x) else x for x in table["XMin"].to_pylist()]
    found = list(zip(table["ImageID"].to_pylist(), table["LabelName"].to_pylist(), numbers))
    assert found == read_independently(data)
