"""Help and wrong arguments of the trainer's commands."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.trainer import tiny


def test_help_and_a_wrong_argument_import_only_light_modules() -> None:
    code = """if True:
        import sys
        from contextlib import suppress
        from trainer.commands import compare, evaluate, predict, train
        for command in (compare, evaluate, predict, train):
            assert command.main(["--data.shard=3", "--checkpoint=x", "--out=x", "x"]) == 2
            with suppress(SystemExit):
                command.main(["--help"])
        print([name for name in ("torch", "pandas", "pyarrow", "numpy") if name in sys.modules], file=sys.stderr)
        """
    done = subprocess.run([sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True)
    *errors, modules = done.stderr.splitlines()
    message = "error: unknown argument --data.shard: did you mean --data.shards? (see --help)"
    assert errors == [f"{name}: {message}" for name in ("compare", "evaluate", "predict", "train")]
    assert modules == "[]"
    assert done.stdout.count("show this help message") == 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("evaluate", "--checkpoint /nowhere --out"),
        ("predict", "a.jpg --checkpoint /nowhere --out"),
        ("predict", "--data.shards DATASET --checkpoint /nowhere --out"),
        ("compare", "compare-layers --data.shards /nowhere --run.dir"),
        ("train", "--data.shards DATASET --data.val_split= --model.weights /nowhere --run.dir"),
    ],
)
def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_loaded(
    name: str, words: str, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*words.replace("DATASET", str(dataset)).split(), "/proc/nowhere"]
    assert import_module(f"trainer.commands.{name}").main(arguments) == 2
    message = f"/proc/nowhere: cannot be written (/proc is not a writable folder): choose another {arguments[-2]}"
    assert capsys.readouterr().err == f"{name}: error: {message}\n"
