"""Tables that are not as Open Images ships them: an error of one line, or read, counted and told; never fewer rows."""

import csv
import io
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builder.fetching.table_cache import Cache
from builder.sources import csv_tables as tables
from builder.sources.csv_tables import read_table
from builder.sources.openimages.layout import BOX_COLUMNS, source_location
from builder.sources.openimages.source import OpenImages
from demo.scenes import SceneTruth
from shards.common.errors import UserError
from shards.storage.location import Location
from tests.builder.builds import build, quotas

BOXES = "v6/oidv6-train-annotations-bbox.csv"
MASKS = "v5/train-annotations-object-segmentation.csv"
LABELS = "v5/train-annotations-human-imagelabels-boxable.csv"
METADATA = "2018_04/train/train-images-boxable-with-rotation.csv"
CHOICE = quotas(("Person", "Car"), 4, 0)

Lines = list[bytes]


@dataclass(frozen=True)
class Case:
    """A way to spoil a table's lines, and what is told of it; `same` when the dataset must not show it."""

    spoil: Callable[[Lines], bytes]
    told: str
    error: bool = True
    same: bool = False


def lines_with(lines: Lines, at: int, *new: bytes) -> bytes:
    return b"\n".join([*lines[:at], *new, *lines[at:], b""])


def without_column(lines: Lines, name: bytes) -> bytes:
    column = lines[0].split(b",").index(name)
    return b"\n".join(b",".join(v for n, v in enumerate(line.split(b",")) if n != column) for line in lines)


def with_values(lines: Lines, names: str, values: str) -> bytes:
    """The first row a second time, as a Person with other values."""
    columns = lines[0].decode().split(",")
    row = dict(zip(columns, lines[1].decode().split(",")))
    row.update({"LabelName": "/m/01g317"} | dict(zip(names.split(","), values.split(","))))
    return lines_with(lines, 2, ",".join(row.values()).encode())


def quoted(lines: Lines) -> bytes:
    out = io.StringIO()
    rows = list(csv.reader(line.decode() for line in lines))
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows(rows)
    return out.getvalue().encode()


ERRORS = {
    "a column is missing": Case(lambda t: without_column(t, b"XMin"), "there is no column XMin"),
    "semicolons": Case(lambda t: b"\n".join(t).replace(b",", b";"), "which ';' seems to separate"),
    "tabs": Case(lambda t: b"\n".join(t).replace(b",", b"\t"), r"which '\t' seems to separate"),
    "no header": Case(lambda t: b"\n".join(t[1:]), "there is no column ImageID"),
    "a second header": Case(lambda t: lines_with(t, 3, t[0]), "conversion error to double: invalid value 'XMin'"),
    "a column twice": Case(lambda t: b"\n".join(line + b"," + line for line in t), "two columns ImageID"),
    "empty": Case(lambda t: b"", "it is empty"),
    "only a byte order mark": Case(lambda t: b"\xef\xbb\xbf", "there is no column ImageID"),
    "blank lines alone": Case(lambda t: b"\n\n\n", "there is no column ImageID"),
    "garbage": Case(lambda t: bytes(range(256)) * 40, "there is no column ImageID"),
    "a picture": Case(lambda t: b"\xff\xd8\xff\xe0" + b"\x00\x01" * 5000, "no header"),
    "UTF-16": Case(lambda t: b"\n".join(t).decode().encode("utf-16"), "no header"),
    "garbage after the header": Case(
        lambda t: lines_with(t[:1], 1, b"\x00\x8f\x13" * 99), "expected 21 columns, got 1"
    ),
    "one long line": Case(lambda t: b",".join(t * 99), "longer than 65536 bytes"),
    "too few values": Case(lambda t: lines_with(t, 2, t[1].rsplit(b",", 2)[0]), "expected 21 columns, got 19"),
    "too many values": Case(lambda t: lines_with(t, 2, t[1] + b",1"), "expected 21 columns, got 22"),
    "cut in the middle of a row": Case(lambda t: b"\n".join(t)[:-60], "expected 21 columns"),
    "a word for a number": Case(lambda t: with_values(t, "XMin", "left"), "invalid value 'left'"),
    "decimal commas": Case(lambda t: with_values(t, "XMin", '"0;5"').replace(b"0;5", b"0,5"), "invalid value '0,5'"),
    "not UTF-8": Case(lambda t: lines_with(t, 2, b"\xe9" + t[1]), "invalid utf8"),
    "a quote that does not end": Case(lambda t: lines_with(t, 2, b'"' + t[1]), "csv"),
    "quotes around line ends": Case(
        lambda t: lines_with(t, 2, t[1].replace(b",", b',"', 1), t[2].replace(b",", b'",', 1).replace(b'",', b'"', 1)),
        "",
    ),
}

BAD_BOX = "1 row whose box is empty, inverted or not of numbers"

COUNTED = {
    "rows of only commas": Case(
        lambda t: lines_with(t, 3, b"," * 20, b"," * 20), "2 rows without ImageID or LabelName", error=False, same=True
    ),
    "a row without a label": Case(
        lambda t: with_values(t, "LabelName", ""), "1 row without ImageID or LabelName", error=False, same=True
    ),
    "not a number": Case(lambda t: with_values(t, "XMin", "NaN"), BAD_BOX, error=False, same=True),
    "no number": Case(lambda t: with_values(t, "XMin", ""), BAD_BOX, error=False, same=True),
    "infinite": Case(lambda t: with_values(t, "XMax", "inf"), BAD_BOX, error=False, same=True),
    "inverted": Case(lambda t: with_values(t, "XMin,XMax", "0.9,0.1"), BAD_BOX, error=False, same=True),
    "in pixels": Case(lambda t: with_values(t, "XMin,XMax,YMin,YMax", "10,90,10,90"), BAD_BOX, error=False, same=True),
    "beside the image": Case(lambda t: with_values(t, "XMin,XMax", "1.1,1.4"), BAD_BOX, error=False, same=True),
    "an impossible ImageID": Case(
        lambda t: with_values(t, "ImageID", "../../etc/passwd"), "impossible ImageID", error=False, same=True
    ),
    "no rows": Case(lambda t: t[0] + b"\n", "holds a header and no rows", error=False),
    "no rows, no line end": Case(lambda t: t[0], "holds a header and no rows", error=False),
}

READ = {
    "CRLF": Case(lambda t: b"\r\n".join([*t, b""]), "", error=False, same=True),
    "CR": Case(lambda t: b"\r".join([*t, b""]), "", error=False, same=True),
    "no line end at the end": Case(lambda t: b"\n".join(t), "", error=False, same=True),
    "blank lines": Case(lambda t: b"\n\n".join([*t, b"", b"\r\n"]), "", error=False, same=True),
    "a byte order mark": Case(lambda t: b"\xef\xbb\xbf" + b"\n".join(t), "", error=False, same=True),
    "quotes": Case(quoted, "", error=False, same=True),
    "spaces": Case(lambda t: b"\n".join(t).replace(b",", b" , "), "", error=False, same=True),
    "not UTF-8 where nobody looks": Case(
        lambda t: with_values(t, "Source", "x").replace(b",x,", b",\xe9,"), "", error=False
    ),
}


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_told", set())


@pytest.fixture(scope="module")
def clean(scenes: SceneTruth, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of the tables as they should be."""
    root = tmp_path_factory.mktemp("clean")
    build(mirror(scenes, root / "annotations", {}), CHOICE, Location(str(root / "out")))
    return shards_of(root / "out")


def mirror(scenes: SceneTruth, root: Path, replaced: dict[str, bytes], cache: Cache | None = None) -> OpenImages:
    """The scenes, with other contents of some tables."""
    shutil.copytree(scenes.annotations, root, copy_function=os.symlink)
    for name, data in replaced.items():
        (root / name).unlink()
        (root / name).write_bytes(data)
    return OpenImages(source_location(str(scenes.images)), source_location(str(root)), cache)


def shards_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.tar"))}


def lines_of(scenes: SceneTruth, name: str) -> Lines:
    return (Path(scenes.annotations) / name).read_bytes().splitlines()


def check_error(error: UserError, name: str, told: str) -> None:
    text = str(error)
    assert name in text
    assert told.lower() in text.lower()
    assert "--annotations" in text
    assert len(text) < 1000 + len(name)


def check_accounts(root: Path) -> None:
    """Every image and mask of the shards is in the accounts, once."""
    accounts = pq.read_table(root / "accounts.parquet").to_pylist()
    keys = [(row["split"], row["kind"], row["image_id"], row["source"]) for row in accounts]
    assert len(keys) == len(set(keys))
    packed = sum(row["kind"] == "image" and row["status"] == "packed" for row in accounts)
    assert packed == pq.read_table(root / "index.parquet").num_rows


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS.keys())
def test_what_cannot_be_read_is_one_error(scenes: SceneTruth, tmp_path: Path, case: Case) -> None:
    data = case.spoil(lines_of(scenes, BOXES))
    table = Location(str(tmp_path / "boxes.csv"))
    table.write(data)
    with pytest.raises(UserError) as caught:
        read_table(table, BOX_COLUMNS, {"LabelName": pa.array(["/m/01g317"])})
    check_error(caught.value, "boxes.csv", case.told)
    cache = Cache(str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        build(mirror(scenes, tmp_path / "a", {BOXES: data}, cache), CHOICE, Location(str(tmp_path / "out")))
    check_error(caught.value, BOXES, case.told)
    assert not list((tmp_path / "cache").glob("*bbox*"))  # nothing of a broken table is kept


@pytest.mark.parametrize("case", [*COUNTED.values(), *READ.values()], ids=[*COUNTED, *READ])
def test_what_can_be_read_is_read_and_what_is_left_out_is_told(
    scenes: SceneTruth,
    clean: dict[str, bytes],
    tmp_path: Path,
    case: Case,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "builder")
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1000)  # line ends between blocks
    data = case.spoil(lines_of(scenes, BOXES))
    cache = Cache(str(tmp_path / "cache"))
    source = mirror(scenes, tmp_path / "a", {BOXES: data}, cache)
    for name in ("first", "cached"):
        caplog.clear()
        tables._told.clear()
        build(source, CHOICE, Location(str(tmp_path / name)))
        told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(told) == (1 if case.told else 0), told
        if told:
            assert BOXES in told[0]
            assert case.told in told[0]
        check_accounts(tmp_path / name)
        if case.same:
            assert shards_of(tmp_path / name) == clean


@pytest.mark.parametrize("name", [MASKS, LABELS, METADATA])
@pytest.mark.parametrize("kind", ["empty", "garbage", "semicolons", "no header", "too many values", "not UTF-8"])
def test_the_other_tables_are_told_alike(scenes: SceneTruth, tmp_path: Path, name: str, kind: str) -> None:
    data = ERRORS[kind].spoil(lines_of(scenes, name))
    with pytest.raises(UserError) as caught:
        build(mirror(scenes, tmp_path / "a", {name: data}), CHOICE, Location(str(tmp_path / "out")))
    check_error(caught.value, name, "")


@pytest.mark.parametrize("kind", ["CRLF", "CR", "a byte order mark", "quotes", "blank lines", "spaces"])
def test_the_other_tables_are_read_alike(
    scenes: SceneTruth, clean: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    names = (MASKS, LABELS) if kind == "spaces" else (MASKS, LABELS, METADATA)  # a quote after a space is a quote
    replaced = {name: READ[kind].spoil(lines_of(scenes, name)) for name in names}
    build(mirror(scenes, tmp_path / "a", replaced), CHOICE, Location(str(tmp_path / "out")))
    assert shards_of(tmp_path / "out") == clean


def test_titles_may_hold_line_ends_and_rows_that_a_quote_swallows_are_told(
    scenes: SceneTruth, clean: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = lines_of(scenes, METADATA)
    titled = b"\n".join([*lines, b'0123456789abcdef,train,,,,,,"a title\nof two lines",,,,0.0'])
    build(mirror(scenes, tmp_path / "a", {METADATA: titled}), CHOICE, Location(str(tmp_path / "out")))
    assert shards_of(tmp_path / "out") == clean
    [told] = [message for message in caplog.messages if "line ends" in message]
    assert f"{len(lines) + 2} lines make {len(lines) + 1} rows" in told


@pytest.mark.parametrize("name", [BOXES, MASKS, LABELS, METADATA])
def test_repeated_rows_count_once(
    scenes: SceneTruth, clean: dict[str, bytes], tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    lines = lines_of(scenes, name)
    doubled = b"\n".join([lines[0], *(line for line in lines[1:] for _ in range(2))])
    build(mirror(scenes, tmp_path / "a", {name: doubled}), CHOICE, Location(str(tmp_path / "out")))
    assert shards_of(tmp_path / "out") == clean
    if name in (BOXES, MASKS):
        assert any(name in message and "repeated among those" in message for message in caplog.messages)


# Any damage at all, against the standard library's reader.

SMALL = {"ImageID": "string", "LabelName": "string", "XMin": "float64"}
WANTED = {"/m/a", "/m/b"}
VALID = b"ImageID,Source,LabelName,XMin\n" + b"".join(
    b"%04x,x click,/m/%c,0.%d\n" % (n, b"abc"[n % 3], n * 7) for n in range(12)
)
PIECES = [b",", b"\n", b"\r", b"\r\n", b'"', b'""', b'","', b";", b" ", b"\t", b"\xff", b"\0", b"nan", b",,,\n", b"1"]
PIECES += [b"\xef\xbb\xbf", b"\xc3\xa9", b"/m/a", b"ImageID", b"\n\n", b"-", b"e5", b"\x0b"]

damage = st.one_of(
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
        else:  # two columns change places, in the rows only where the header is damaged
            rows = [line.split(b",") for line in data.split(b"\n")]
            for row in rows:
                if max(at, what) < len(row):
                    row[at], row[what] = row[what], row[at]
            data = b"\n".join(map(b",".join, rows))
    return data


def read_independently(data: bytes) -> list[tuple[str, str, float | None]] | None:
    """The rows wanted, by the csv module; None for what is no table of these columns."""
    text = data.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
        header = [name.strip() for name in rows[0]]
        if any(len(row) != len(header) for row in rows) or any(header.count(name) != 1 for name in SMALL):
            return None
        kept = []
        for row in rows[1:]:
            image, label, x = (row[header.index(name)].strip(" \t\r\n\v\f") for name in SMALL)
            value = float(x) if x else None
            if label in WANTED:
                kept.append((image, label, None if value is None or math.isnan(value) else value))
        return kept
    except (csv.Error, ValueError, IndexError):
        return None


@settings(max_examples=400)
@given(st.lists(damage, max_size=4), st.sampled_from([48, 200, 1 << 20]))
@example([("insert", 40, b'"'), ("insert", 70, b'"')], 1 << 20)
@example([("insert", 36, b'"'), ("insert", 59, b'"')], 1 << 20)
def test_any_damage_is_an_error_or_read_as_the_standard_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, object]], block: int
) -> None:
    data = damaged(VALID, steps)
    location = Location(str(tmp_path_factory.getbasetemp() / "damaged.csv"))
    Path(location.path).write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BLOCK_BYTES", block)
        error = ""
        try:
            table = read_table(location, SMALL, {"LabelName": pa.array(sorted(WANTED))})
        except UserError as raised:
            error = str(raised)
    if error:
        assert steps
        assert location.url in error
        return
    found = [
        (row["ImageID"], row["LabelName"], None if row["XMin"] is None or math.isnan(row["XMin"]) else row["XMin"])
        for row in table.to_pylist()
    ]
    assert found == read_independently(data)
