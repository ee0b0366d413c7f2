from pathlib import Path

import pytest

from builder.commands.cli import command_line, main, make_parser
from builder.commands.yaml_options import with_config
from shards.common.errors import UserError


def parse(tmp_path: Path, text: str, *arguments: str) -> list[str]:
    file = tmp_path / "traffic.yaml"
    file.write_text(text)
    return with_config(make_parser(), ["--config", str(file), *arguments])


def test_a_file_and_flags_ask_for_the_same(tmp_path: Path) -> None:
    text = """
        classes: [Person, Traffic light]
        per_class: 7
        eval-per-class: 0
        exact_classes: true
        all-annotations: false
        splits: partition
        partition: [0.5, 0.25, 0.25]
        out: /a b
    """
    from_file = make_parser().parse_args(parse(tmp_path, text))
    flags = "--per-class 7 --eval-per-class 0 --exact-classes --splits partition --partition 0.5 0.25 0.25"
    from_flags = make_parser().parse_args([*flags.split(), "--classes", "Person", "Traffic light", "--out", "/a b"])
    assert command_line(from_file) == command_line(from_flags)


def test_flags_win(tmp_path: Path) -> None:
    words = parse(tmp_path, "per-class: 7\nclasses: [Person, Car]\nseed: 3", "--per-class", "9", "--classes", "Dog")
    args = make_parser().parse_args(words)
    assert (args.per_class, args.classes, args.seed) == (9, ["Dog"], 3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("per_clas: 7", "no option 'per_clas': did you mean per-class"),
        ("help: true", "no option 'help'"),
        ("config: other.yaml", "no option 'config'"),
        ("xyzzy: 1", "see --help"),
        ("[1, 2]", "not a mapping"),
        ("per-class: {a: 1}", "give one value"),
        ("per-class: [1, 2]", "give one value"),
        ("per-class:", "give one value"),
        ("classes: [Person, No]", "in quotes"),
        ("exact-classes: 3", "true or false"),
        ("a: [", "not YAML"),
        ("a: !!python/object:os.system x", "not YAML"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    with pytest.raises(UserError, match=r"^--config .*traffic\.yaml: ") as caught:
        parse(tmp_path, text)
    assert told in str(caught.value)
    assert main(["--config", str(tmp_path / "traffic.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        with_config(make_parser(), ["--config=/nowhere.yaml"])


def test_values_that_look_like_flags_stay_values(tmp_path: Path) -> None:
    assert make_parser().parse_args(parse(tmp_path, "out: --strange")).out == "--strange"
    with pytest.raises(SystemExit):
        make_parser().parse_args(parse(tmp_path, "per-class: -3"))
