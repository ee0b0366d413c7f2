import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from builder.commands.cli import main
from builder.commands.options import BuildOptions, command_line, parse
from builder.sources.base import FLAGS
from shards.common.errors import UserError
from tests.support import REPOSITORY


def test_help_and_a_wrong_argument_import_only_light_modules() -> None:
    code = """if True:
        import sys
        from builder.commands.cli import main
        assert main(["--per-class", "many"]) == 2
        try:
            main(["--help"])
        except SystemExit:
            heavy = ("torch", "webdataset", "pandas", "pyarrow", "numpy", "PIL")
            print([module for module in heavy if module in sys.modules], file=sys.stderr)
        """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert "--per-class" in found.stdout
    error, modules = found.stderr.splitlines()
    assert error == "build-shards: error: --per-class: 'many' is not a whole number"
    assert modules == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--per-class N is required"),
        ("--per-class 5 --partition 0.8 0.1 0.1", "needs --splits partition"),
        ("--per-class 5 --splits partition --partition 0 0 0", "greater than 0"),
        ("--per-class 5 --drop depiction,blurred", "'blurred' is not one of depiction, inside"),
        ("--per-class 5 --images-list ids.txt", "omit --per-class"),
        ("--per-class 5 --annotations a b", "--source coco"),
        ("--per-class 5 --dry-run --overwrite", "cannot be combined"),
        ("--per-class 5 --cache x --no-cache", "cannot be combined"),
        ("--source coco --images /x", "needs --images"),
        ("--source coco --images x --splits partition --annotations train=a val=b", "cuts a single split"),
        ("--per-class 1 --keep-empty", "--keep-empty is for sources other than open-images"),
        ("--config /nowhere.yaml", "give the path of a YAML file"),
    ],
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert main(words.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("build-shards: error: ")
    assert message in line


def test_per_class_alone_is_a_complete_command() -> None:
    options = parse(["--per-class", "1000"])
    assert "--classes Person Car 'Traffic light' 'Traffic sign'" in command_line(options)
    assert options.images == ["s3://open-images-dataset"]
    assert options.annotations == ["https://storage.googleapis.com/openimages"]
    assert options.out == "./shards-data"


def test_the_recorded_command_builds_the_same_dataset() -> None:
    words = "--classes Person x --per-class 7 --splits partition --partition 0.5 0.25 0.25 --exact-classes --seed 3"
    words += " --min-predicted-iou 0.75 --drop inside,depiction --require-mask --all-annotations"
    words += " --source coco --images i --annotations train=a --out"
    options = parse([*words.split(), "/a b", "--workers", "9", "--overwrite"])
    recorded = shlex.split(command_line(options))
    again = parse(recorded[1:])
    assert again != options
    again.workers, again.overwrite = 9, True
    assert again == options
    assert command_line(parse(["--images-list", "my ids.txt", "--splits", "partition"])) == (
        "build-shards --classes Person Car 'Traffic light' 'Traffic sign' --images-list 'my ids.txt' "
        "--splits partition --partition 0.8 0.1 0.1 --seed 0 --images-per-shard 256 --images s3://open-images-dataset "
        "--annotations https://storage.googleapis.com/openimages --out ./shards-data"
    )


def test_every_flag_of_an_annotation_can_be_dropped() -> None:
    assert parse(["--per-class", "1", "--drop", ",".join(FLAGS)]).drop == sorted(FLAGS)


def test_the_recorded_command_has_no_credentials() -> None:
    url = "https://me:it's@host/i.json?apikey='s3cret\"&part=2"
    recorded = command_line(parse(["--source", "coco", "--images", url, "--annotations", f"val={url}", f"test={url}"]))
    words = shlex.split(recorded)
    safe = "https://***@host/i.json?apikey=***&part=***"
    assert words[words.index("--images") + 1] == safe
    assert words[words.index("--annotations") + 1 :][:2] == [f"val={safe}", f"test={safe}"]


def test_a_file_sets_options_and_the_command_line_overrides_it(tmp_path: Path) -> None:
    file = tmp_path / "traffic.yaml"
    file.write_text("per_class: 7\nclasses: [Person, Car]\neval-per-class: 0\nout: --strange\ndry-run: false")
    options = parse(["--per-class", "9", "--classes", "Dog", "--config", str(file)])
    assert options == BuildOptions(per_class=9, classes=["Dog"], eval_per_class=0, out="--strange")
    file.write_text("per_clas: 7")
    with pytest.raises(
        UserError, match=r"^--config .*traffic\.yaml: unknown option 'per-clas': did you mean per-class"
    ):
        parse(["--config", str(file)])
