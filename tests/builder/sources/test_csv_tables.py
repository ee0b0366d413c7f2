import csv
import io
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
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
from builder.sources.openimages.layout import BOX_COLUMNS, LABEL_COLUMNS, MASK_COLUMNS, METADATA_COLUMNS, Layout
from demo.scenes import SceneTruth
from shards.common.errors import StorageError, UserError
from shards.storage.location import Location

COLUMNS = {"ImageID": "string", "LabelName": "string", "XMin": "float64"}
LABELS = {"LabelName": pa.array(["/m/a"])}


def write(path: Path, data: str | bytes) -> Location:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return Location(str(path))


def test_rows_are_filtered_over_many_blocks_and_other_columns_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 5000)
    lines = [f"{n:016x},x,{'/m/a' if n % 10 == 0 else '/m/b'},{n / 1000},{'c' * 20}\n" for n in range(1000)]
    location = write(tmp_path / "t.csv", "".join(["ImageID,Source,LabelName,XMin,Clicks\n", *lines]))
    table = read_table(location, COLUMNS, LABELS)
    assert table.column_names == list(COLUMNS)
    assert table["ImageID"].to_pylist() == [f"{n:016x}" for n in range(0, 1000, 10)]
    nothing = read_table(location, COLUMNS, {"LabelName": pa.array(["/m/c"])})
    assert nothing.num_rows == 0
    assert nothing.schema == table.schema


def test_a_missing_table_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone\.csv"):
        read_table(Location(str(tmp_path / "gone.csv")), COLUMNS, LABELS)


@pytest.mark.parametrize("many", [0, 10_000])
def test_few_and_many_values_keep_the_order(tmp_path: Path, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_tables, "GATHER_ROWS", 700)
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 2000)
    text = "ImageID,LabelName,XMin\n" + "".join(f"i{n},/m/{n % 3},{n}\n" for n in range(5000))
    images = [f"i{n}" for n in range(0, 5000, 4)] + [f"none{n}" for n in range(many)]
    where = {"LabelName": pa.array(["/m/0", "/m/2"]), "ImageID": pa.array(images)}
    table = read_table(write(tmp_path / "t.csv", text), COLUMNS, where)
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
    table = read_table(write(tmp_path / "t.csv", ends.join(lines)), COLUMNS, LABELS)
    assert table["XMin"].to_pylist() == list(range(200))


# The four tables of Open Images, damaged.

Lines = list[bytes]
TABLES = {
    "boxes": (Layout.boxes, BOX_COLUMNS),
    "masks": (Layout.masks, MASK_COLUMNS),
    "labels": (Layout.labels, LABEL_COLUMNS),
    "metadata": (Layout.metadata, METADATA_COLUMNS),
}
ALL, BOXES = tuple(TABLES), ("boxes",)


@dataclass(frozen=True)
class Damage:
    """A change of a table's lines, words of the message that it causes, and the tables that it is tried on."""

    apply: Callable[[Lines], bytes]
    message: str = ""
    tables: tuple[str, ...] = BOXES


def insert(lines: Lines, at: int, *new: bytes) -> bytes:
    return b"\n".join([*lines[:at], *new, *lines[at:], b""])


def without_column(lines: Lines, name: bytes) -> bytes:
    column = lines[0].split(b",").index(name)
    return b"\n".join(b",".join(v for n, v in enumerate(line.split(b",")) if n != column) for line in lines)


def with_row(lines: Lines, **values: str) -> bytes:
    """Repeat the first row with other values."""
    row = dict(zip(lines[0].decode().split(","), lines[1].decode().split(",")))
    return insert(lines, 2, ",".join((row | values).values()).encode())


def quoted(lines: Lines) -> bytes:
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows(csv.reader(line.decode() for line in lines))
    return out.getvalue().encode()


ERRORS = {
    "a column is missing": Damage(lambda t: without_column(t, b"XMin"), "there is no column XMin"),
    "semicolons": Damage(lambda t: b"\n".join(t).replace(b",", b";"), "seems to be separated by ';'", ALL),
    "tabs": Damage(lambda t: b"\n".join(t).replace(b",", b"\t"), r"seems to be separated by '\t'"),
    "no header": Damage(lambda t: b"\n".join(t[1:]), "there is no column ImageID", ("boxes", "labels", "metadata")),
    "a second header": Damage(lambda t: insert(t, 3, t[0]), "conversion error to double: invalid value 'XMin'"),
    "a column twice": Damage(lambda t: b"\n".join(line + b"," + line for line in t), "two columns ImageID"),
    "empty": Damage(lambda t: b"", "it is empty", ALL),
    "only a byte order mark": Damage(lambda t: b"\xef\xbb\xbf", "there is no column ImageID"),
    "only blank lines": Damage(lambda t: b"\n\n\n", "there is no column ImageID"),
    "all bytes": Damage(lambda t: bytes(range(256)) * 40, "", ALL),
    "a picture": Damage(lambda t: b"\xff\xd8\xff\xe0" + b"\x00\x01" * 5000, "not a header"),
    "UTF-16": Damage(lambda t: b"\n".join(t).decode().encode("utf-16"), "not a header"),
    "bytes after the header": Damage(lambda t: insert(t[:1], 1, b"\x00\x8f\x13" * 99), "expected 21 columns, got 1"),
    "one long line": Damage(lambda t: b",".join(t * 99), "longer than 65536 bytes"),
    "too few values": Damage(lambda t: insert(t, 2, t[1].rsplit(b",", 2)[0]), "expected 21 columns, got 19"),
    "too many values": Damage(lambda t: insert(t, 2, t[1] + b",1"), "columns, got", ALL),
    "cut in the middle of a row": Damage(lambda t: b"\n".join(t)[:-60], "expected 21 columns"),
    "a word for a number": Damage(lambda t: with_row(t, XMin="left"), "invalid value 'left'"),
    "a decimal comma": Damage(lambda t: with_row(t, XMin='"0,5"'), "invalid value '0,5'"),
    "not UTF-8": Damage(lambda t: insert(t, 2, b"\xe9" + t[1]), "invalid utf8", ("boxes", "labels", "metadata")),
    "a quote that does not end": Damage(lambda t: insert(t, 2, b'"' + t[1]), "csv"),
    "quotes around line ends": Damage(
        lambda t: insert(t, 2, t[1].replace(b",", b',"', 1), t[2].replace(b",", b'",', 1).replace(b'",', b'"', 1))
    ),
}

# Read with the same rows as the undamaged table, but for those that the message counts.
READABLE = {
    "CRLF": Damage(lambda t: b"\r\n".join([*t, b""]), tables=ALL),
    "CR": Damage(lambda t: b"\r".join([*t, b""]), tables=ALL),
    "no line end at the end": Damage(lambda t: b"\n".join(t), tables=ALL),
    "blank lines": Damage(lambda t: b"\n\n".join([*t, b"", b"\r\n"]), tables=ALL),
    "a byte order mark": Damage(lambda t: b"\xef\xbb\xbf" + b"\n".join(t), tables=ALL),
    "quotes": Damage(quoted, tables=ALL),
    "spaces": Damage(lambda t: b"\n".join(t).replace(b",", b" , "), tables=("boxes", "masks", "labels")),
    "not UTF-8 in a column that is not read": Damage(
        lambda t: b"\n".join(line.replace(b",xclick,", b",\xe9,") for line in t)
    ),
    "rows of commas": Damage(lambda t: insert(t, 3, b"," * 20, b"," * 20), "2 rows without ImageID or LabelName"),
    "a row without a label": Damage(lambda t: with_row(t, LabelName=""), "1 row without ImageID or LabelName"),
}


def cases(damages: dict[str, Damage]) -> list[object]:
    return [
        pytest.param(table, damage, id=f"{table}: {kind}")
        for kind, damage in damages.items()
        for table in damage.tables
    ]


def read(data: bytes, table: str, path: Path, cache: Cache, where: dict[str, pa.Array]) -> pa.Table:
    columns = TABLES[table][1]
    return read_table(write(path, data), columns, where, newlines_in_values=table == "metadata", cache=cache)


def lines_of(scenes: SceneTruth, table: str) -> Lines:
    layout = Layout(Location(str(scenes.images)), Location(str(scenes.annotations)))
    return TABLES[table][0](layout, "train").read().splitlines()


def everything(lines: Lines) -> dict[str, pa.Array]:
    """A selection of all rows."""
    rows = list(csv.DictReader(line.decode() for line in lines))
    column = "LabelName" if "LabelName" in rows[0] else "ImageID"
    return {column: pa.array(sorted({row[column] for row in rows}))}


@pytest.mark.parametrize(("table", "damage"), cases(ERRORS))
def test_damage_is_an_error_with_file_fault_and_remedy(
    scenes: SceneTruth, tmp_path: Path, table: str, damage: Damage
) -> None:
    lines = lines_of(scenes, table)
    cache = Cache(str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        read(damage.apply(lines), table, tmp_path / "t.csv", cache, everything(lines))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 't.csv'}: ")
    assert damage.message.lower() in message.lower()
    assert "--annotations" in message
    assert len(message) < 1000
    assert not list(Path(cache.folder).glob("*"))  # nothing of a damaged table is kept


@pytest.mark.parametrize(("table", "damage"), cases(READABLE))
def test_deviations_are_read_and_rows_that_are_left_out_are_counted(
    scenes: SceneTruth,
    tmp_path: Path,
    table: str,
    damage: Damage,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 1000)  # line ends between blocks
    lines = lines_of(scenes, table)
    cache = Cache(str(tmp_path / "cache"))
    selection = everything(lines)
    expected = read(b"\n".join(lines), table, tmp_path / "clean.csv", cache, selection)
    assert expected.num_rows
    for _ in ("from the source", "from the cache"):
        caplog.clear()
        log_once._logged.clear()
        assert read(damage.apply(lines), table, tmp_path / "t.csv", cache, selection).equals(expected)
        warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert warnings == [f"{tmp_path / 't.csv'}: {damage.message}: left out"] * bool(damage.message)


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_header_without_rows_causes_a_warning(tmp_path: Path, end: bytes, caplog: pytest.LogCaptureFixture) -> None:
    location = write(tmp_path / "t.csv", b"ImageID,LabelName,XMin" + end)
    assert read_table(location, COLUMNS, LABELS).num_rows == 0
    assert caplog.messages == [f"{location}: has a header and no rows"]


def test_values_with_line_ends_cause_a_warning_where_they_are_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    location = write(tmp_path / "t.csv", 'ImageID,Title\na1,one\na2,"a title\nof two lines"\n')
    columns = {"ImageID": "string", "Title": "string"}
    table = read_table(location, columns, {"ImageID": pa.array(["a2"])}, newlines_in_values=True)
    assert table["Title"].to_pylist() == ["a title\nof two lines"]
    [warning] = caplog.messages
    assert "4 lines make 3 rows" in warning


# Any damage, against the standard library's reader.

WANTED = {"/m/a", "/m/b"}
VALID = b"ImageID,Source,LabelName,XMin\n" + b"".join(
    b"%04x,x click,/m/%c,0.%d\n" % (n, b"abc"[n % 3], n * 7) for n in range(12)
)
PIECES = [b",", b"\n", b"\r", b"\r\n", b'"', b'""', b'","', b";", b" ", b"\t", b"\xff", b"\0", b"nan", b",,,\n", b"1"]
PIECES += [b"\xef\xbb\xbf", b"\xc3\xa9", b"/m/a", b"ImageID", b"\n\n", b"-", b"e5", b"\x0b"]

damage_steps = st.one_of(
    st.tuples(st.just("insert"), st.integers(0, len(VALID)), st.sampled_from(PIECES)),
    st.tuples(st.just("delete"), st.integers(0, len(VALID)), st.integers(1, 40)),
    st.tuples(st.just("repeat"), st.integers(0, 12), st.integers(1, 3)),
    st.tuples(st.just("swap"), st.integers(0, 3), st.integers(0, 3)),
)


def damaged(data: bytes, steps: list[tuple[str, int, object]]) -> bytes:
    for kind, at, what in steps:
        if kind == "insert":
            assert isinstance(what, bytes)
            data = data[:at] + what + data[at:]
            continue
        assert isinstance(what, int)
        if kind == "delete":
            data = data[:at] + data[at + what :]
        elif kind == "repeat":
            lines = data.split(b"\n")
            data = b"\n".join(lines[: at + 1] + lines[at : at + 1] * what + lines[at + 1 :])
        else:  # swap two columns; only in the rows if the header is damaged
            rows = [line.split(b",") for line in data.split(b"\n")]
            for row in rows:
                if max(at, what) < len(row):
                    row[at], row[what] = row[what], row[at]
            data = b"\n".join(map(b",".join, rows))
    return data


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
            if label in WANTED:
                kept.append((image, label, None if value is None or math.isnan(value) else value))
        return kept
    except (csv.Error, ValueError, IndexError):
        return None


@settings(max_examples=400)
@given(st.lists(damage_steps, max_size=4), st.sampled_from([48, 200, 1 << 20]))
@example([("insert", 40, b'"'), ("insert", 70, b'"')], 1 << 20)
@example([("insert", 36, b'"'), ("insert", 59, b'"')], 1 << 20)
def test_any_damage_is_an_error_or_read_as_the_standard_library_does(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, object]], block: int
) -> None:
    data = damaged(VALID, steps)
    location = write(tmp_path_factory.getbasetemp() / "damaged.csv", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_tables, "BLOCK_BYTES", block)
        error = ""
        try:
            table = read_table(location, COLUMNS, {"LabelName": pa.array(sorted(WANTED))})
        except UserError as raised:
            error = str(raised)
    if error:
        assert steps
        assert location.url in error
        return
    numbers = [None if x is None or math.isnan(x) else x for x in table["XMin"].to_pylist()]
    found = list(zip(table["ImageID"].to_pylist(), table["LabelName"].to_pylist(), numbers))
    assert found == read_independently(data)
