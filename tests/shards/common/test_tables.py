import pandas as pd

from shards.common.tables import markdown_table, percent, text_table
from shards.common.text import columns_of


def test_text_table_aligns_text_left_and_numbers_right() -> None:
    table = pd.DataFrame({"class": ["Person", "Car"], "boxes": [10, 5], "share": [0.5, None], "note": ["", "rare"]})
    assert text_table(table, {"share": percent}, indent="  ") == [
        "  class   boxes  share  note",
        "  Person     10    50%",
        "  Car         5      -  rare",
    ]
    assert text_table(table[["share"]])[1:] == ["  0.5", "    -"]
    assert text_table(table.head(0)) == ["class  boxes  share  note"]
    assert text_table(pd.DataFrame()) == []


def test_text_table_aligns_names_of_any_script_and_width() -> None:
    names = ["Personal flotation device", "\x1b[2J\n\u202eCar", "人" * 20, "Cafe\u0301"]
    lines = text_table(pd.DataFrame({"class": names, "boxes": range(len(names))}))
    assert len(set(map(columns_of, lines))) == 1
    assert r"\x1b[2J\n\u202eCar" in lines[2]
    # A very long name shifts its own line, and not the others.
    long, short = text_table(pd.DataFrame({"class": ["x" * 100, "y"], "boxes": [1, 2]}))[1:]
    assert (columns_of(long), columns_of(short)) == (107, 67)


def test_text_table_writes_a_group_of_columns_once() -> None:
    columns = pd.MultiIndex.from_tuples([("", "class"), ("boxes", "AP"), ("boxes", "AP50"), ("masks", "AP")])
    assert text_table(pd.DataFrame([["Car", 1.0, 2.0, 3.0]], columns=columns)) == [
        "            boxes  masks",
        "class   AP   AP50     AP",
        "Car    1.0    2.0    3.0",
    ]


def test_markdown_table() -> None:
    table = pd.DataFrame({"setting": ["all", "a|b"], "box AP": [0.123, None], "at step": [10, 20]})
    assert markdown_table(table, {"box AP": lambda value: f"{100 * value:.1f}"}) == [
        "| setting | box AP | at step |",
        "| --- | --- | --- |",
        "| all | 12.3 | 10 |",
        r"| a\|b | - | 20 |",
    ]
