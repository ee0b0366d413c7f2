from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from builder.sources import csv_tables as tables
from builder.sources.csv_tables import BLOCK_BYTES, leave_out, read_table
from shards.common.errors import StorageError, UserError
from shards.storage.location import Location

COLUMNS = {"ImageID": "string", "LabelName": "string", "XMin": "float64"}
LABELS = {"LabelName": pa.array(["/m/a"])}


def write(path: Path, text: str | bytes) -> Location:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Location(str(path))


def test_rows_are_filtered_over_many_blocks_and_other_columns_dropped(tmp_path: Path) -> None:
    line = "{:016x},x,{},{},{}\n"
    rows = 3 * BLOCK_BYTES // 50
    text = "ImageID,Source,LabelName,XMin,Clicks\n" + "".join(
        line.format(i, "/m/a" if i % 1000 == 0 else "/m/b", i / rows, "c" * 20) for i in range(rows)
    )
    assert len(text) > 2 * BLOCK_BYTES
    table = read_table(write(tmp_path / "t.csv", text), COLUMNS, LABELS)
    assert table.column_names == list(COLUMNS)
    assert table["ImageID"].to_pylist() == [f"{i:016x}" for i in range(0, rows, 1000)]


@pytest.mark.parametrize(
    "text", ["\ufeffImageID,LabelName,XMin\nq,/m/a,0.5\n", "ImageID,LabelName,XMin\r\nq,/m/a,0.5\r\n"]
)
def test_bom_and_carriage_returns_are_read(tmp_path: Path, text: str) -> None:
    table = read_table(write(tmp_path / "t.csv", text), COLUMNS, LABELS)
    assert table.to_pylist() == [{"ImageID": "q", "LabelName": "/m/a", "XMin": 0.5}]


def test_rows_of_only_commas_are_filtered_away_and_empty_numbers_are_null(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t.csv", "ImageID,LabelName,XMin\n,,\nq,/m/a,\n"), COLUMNS, LABELS)
    assert table.to_pylist() == [{"ImageID": "q", "LabelName": "/m/a", "XMin": None}]


def test_no_row_that_fits_is_an_empty_table_of_the_same_columns(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t.csv", "ImageID,LabelName,XMin\nq,/m/b,1\n"), COLUMNS, LABELS)
    assert table.num_rows == 0
    assert table.column_names == list(COLUMNS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ImageID,LabelName\nq,/m/a\n", "no column XMin"),
        ("ImageID;LabelName;XMin\nq;/m/a;1\n", "no column ImageID, LabelName, XMin"),
        ("ImageID,LabelName,XMin\nq,/m/a,left\n", "left"),
        ("ImageID,LabelName,XMin\nq,/m/a\n", "not the CSV table"),
        (b"ImageID,LabelName,XMin\n\xff\xfe,/m/a,1\n", "not the CSV table"),
        ("", "not the CSV table"),
    ],
)
def test_damaged_tables_are_one_user_error_that_names_file_and_fault(
    tmp_path: Path, text: str | bytes, told: str
) -> None:
    location = write(tmp_path / "t.csv", text)
    with pytest.raises(UserError) as caught:
        read_table(location, COLUMNS, LABELS)
    assert str(location) in str(caught.value)
    assert told in str(caught.value)
    assert "--annotations" in str(caught.value)


def test_missing_table_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone\.csv"):
        read_table(Location(str(tmp_path / "gone.csv")), COLUMNS, LABELS)


@pytest.mark.parametrize("many", [0, 10_000])
def test_filters_of_few_and_many_values_keep_the_order(
    tmp_path: Path, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GATHER_ROWS", 700)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 2000)
    text = "ImageID,LabelName,XMin\n" + "".join(f"i{n},/m/{n % 3},{n}\n" for n in range(5000))
    images = [f"i{n}" for n in range(0, 5000, 4)] + [f"none{n}" for n in range(many)]
    where = {"LabelName": pa.array(["/m/0", "/m/2"]), "ImageID": pa.array(images)}
    table = read_table(write(tmp_path / "t.csv", text), COLUMNS, where)
    assert table["XMin"].to_pylist() == [n for n in range(0, 5000, 4) if n % 3 != 1]


def test_what_is_left_out_is_told_once_and_good_blocks_are_not_copied(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_told", set())
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
    monkeypatch.setattr(tables, "BLOCK_BYTES", block)
    lines = ["ImageID,LabelName,XMin", *(f"{n:03},/m/a,{n}" for n in range(200))]
    table = read_table(write(tmp_path / "t.csv", ends.join(lines)), COLUMNS, LABELS)
    assert table["XMin"].to_pylist() == list(range(200))
