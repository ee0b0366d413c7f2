"""Options of a flat dataclass, as `build-shards` has them; sections are tested with the trainer's settings."""

import io
import logging
import sys
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import Mock

import pytest

from shards.commands.command_line import Parser, run
from shards.commands.options import ConfigError, add_options, check, from_arguments, option, set_from_yaml
from shards.common.errors import UserError
from shards.common.text import one_line
from shards.common.version import __version__

LAUGHS = "\n".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi"))
LAUGHS = "a: &a [1]\n" + LAUGHS
Flag = Literal["inside", "occluded"]


@dataclass
class Options:
    images: list[str] = option([], "images", positional=True)
    classes: list[str] = option([], "names")
    per_class: int | None = option(None, "images per class", low=1)
    score: float = option(0.5, "lowest score", low=0, high=1)
    splits: Literal["official", "partition"] = option("official", "which splits")
    partition: tuple[float, float, float] | None = option(None, "fractions", low=0, metavar=("A", "B", "C"))
    drop: list[Flag] = option([], "flags", commas=True)
    exact_classes: bool = option(False, "no children")
    pictures: bool | None = option(None, "draw")
    shards: str = option("", "dataset", flag="data.shards", group="a dataset")
    dry_run: bool = option(False, "plan", exclusive="action")
    retry: bool = option(False, "retry", exclusive="action")


def parser() -> Parser:
    made = Parser(prog="try", description="Try.")
    add_options(made, Options)
    return made


def parse(*words: str) -> Options:
    return from_arguments(Options, parser().parse_args(words))


def from_file(text: str) -> Options:
    options = Options()
    set_from_yaml(options, text.encode(), "config c.yaml")
    return options


def test_a_command_line_and_a_file_become_a_dataclass() -> None:
    assert parse() == Options()
    words = "a.jpg b.jpg --per-class 010 --score 1e-1 --splits partition --partition .5 .25 .25 --drop inside,occluded"
    words += " --exact-classes --no-pictures --data.shards 007 --dry-run --classes Person 1"
    options = parse(*words.split())
    same: dict[str, Any] = {"score": 0.1, "splits": "partition", "partition": (0.5, 0.25, 0.25), "exact_classes": True}
    files: dict[str, Any] = {"images": ["a.jpg", "b.jpg"], "shards": "007", "pictures": False, "dry_run": True}
    assert options == Options(classes=["Person", "1"], per_class=10, drop=["inside", "occluded"], **same, **files)
    text = "classes: [Person, Traffic light]\nper_class: 7\nscore: 1e-1\npartition: [0.5, 0.25, 0.25]\ndrop: inside"
    text += "\nexact-classes: true\nsplits: partition\ndata.shards: --strange"
    classes = ["Person", "Traffic light"]
    assert from_file(text) == Options(classes=classes, per_class=7, drop=["inside"], shards="--strange", **same)
    assert from_file("") == Options()
    assert from_file("classes: Dog").classes == ["Dog"]
    assert from_file("per-class: '5'\nscore: '.5'") == Options(per_class=5, score=0.5)
    assert from_file("drop: [inside, occluded]").drop == ["inside", "occluded"]


NOT_WHOLE = ("many", "2.5", "0x10", "1:30", "1_000", "2024-13-45", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--per-clas 3", "unknown argument --per-clas: did you mean --per-class?"),
        ("--per-class", "argument --per-class: expected one argument"),
        *((f"--per-class={word}", f"--per-class: '{word}' is not a whole number") for word in NOT_WHOLE),
        ("--score 1_0", "--score: '1_0' is not a number"),
        ("--per-class 0", "--per-class is 0: it must be at least 1"),
        ("--score 80", "--score is 80.0: it must be between 0 and 1"),
        ("--score nan", "--score is nan: give a finite number"),
        ("--splits all", "argument --splits: invalid choice: 'all'"),
        ("--drop inside,blurred", "--drop: 'blurred' is not one of inside, occluded"),
        ("--partition 0.5 0.5", "argument --partition: expected 3 arguments"),
        ("--partition 0.5 -1 0.5", r"--partition is \(0.5, -1.0, 0.5\): it must be at least 0"),
        ("--dry-run --retry", "--dry-run and --retry cannot be combined"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(*words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("per_clas: 7", "unknown option 'per-clas': did you mean per-class"),
        ("xyzzy: 1", "unknown option 'xyzzy': known are classes, data.shards"),
        ("[1, 2]", "holds list, not a mapping of options to values"),
        ("per-class: {a: 1}", r"per-class: {'a': 1} is not a whole number"),
        ("per-class:", "per-class has no value"),
        ("per-class: -3", "--per-class is -3: it must be at least 1"),
        ("classes: [Person, No]", "classes: False is not text: write it in quotes"),
        ("partition: [0.5, 0.5]", r"partition: \[0.5, 0.5\] has 2 values: give 3"),
        ("exact-classes: 3", "exact-classes: 3 is not true or false"),
        ("per-class: 2024-13-45", "not YAML: month must be in 1..12"),
        pytest.param("[" * 2000, "not YAML", id="nested"),
        (LAUGHS, r"not YAML: its aliases expand to 1e\+\d+ values"),
        ("a: &a [1, *a]", "not YAML: an alias stands for a value that contains it"),
        ("a: !!python/object:os.system x", "not YAML"),
        ("dry-run: true\nretry: true", "cannot be combined"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(from_file(text))
    assert "\n" not in str(caught.value)


def test_only_options_are_suggested_for_unknown_arguments() -> None:
    one = Parser(prog="try", description="Try.")
    one.add_argument("--extract")
    with pytest.raises(UserError, match=r"^unknown argument extra \(see --help\)$"):
        one.parse_args(["extra"])


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--help", "--version"):
        with pytest.raises(SystemExit, match="0"):
            parser().parse_args([word])
    text = " ".join(capsys.readouterr().out.split())
    assert "--splits {official,partition}" in text
    assert "--score X lowest score (between 0 and 1; default: 0.5)" in text
    assert "a dataset: --data.shards" in text
    assert text.endswith(f" try {__version__}")


def test_completion_is_left_to_argcomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Mock()
    monkeypatch.setitem(sys.modules, "argcomplete", fake)
    parse()
    assert not fake.autocomplete.called
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    parse()
    assert fake.autocomplete.call_args.args[0].prog == "try"


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("try", lambda: 3) == 3
    assert run("try", Mock(side_effect=UserError("two\nlines")), show=lambda text: one_line(text).upper()) == 2
    assert run("try", Mock(side_effect=KeyboardInterrupt), interrupted="run it again") == 130
    assert capsys.readouterr().err == "try: error: TWO LINES\ntry: run it again\n"


def test_an_argument_that_is_not_utf8_is_one_line() -> None:
    with pytest.raises(UserError, match=r"argument 'm\\udce4rz' is not UTF-8: rename the file or folder"):
        parse("--per-class", "3", "m\udce4rz")


def test_a_warning_without_a_log_has_no_credentials(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("test", lambda: 0) == 0
    assert logging.lastResort is not None
    logging.lastResort.handle(
        logging.makeLogRecord({"msg": "waiting for https://me:secret@host/x?sig=5", "levelno": 30})
    )
    assert capfd.readouterr().err == "waiting for https://***@host/x?sig=***\n"


def test_characters_that_the_output_does_not_have_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert run("test", lambda: print("B\xe4r \u732b \udce4") or 0) == 0
    assert output.buffer.getvalue() == b"B\\xe4r \\u732b \\udce4\n"  # type: ignore[attr-defined]
