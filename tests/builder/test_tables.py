from pathlib import Path

import pyarrow as pa
import pytest

from builder.tables import BLOCK_BYTES, read_table
from shards.errors import StorageError, UserError
from shards.storage import Location

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
