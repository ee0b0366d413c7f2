"""The scripts in trainer/ import the packages of their own checkout, however they are started."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tests.trainer import tiny

NAMES = ("train", "evaluate", "predict", "fill", "compare")
LAUNCHER = ["-m", "accelerate.commands.launch"]

# Stands for trainer/commands/NAME.py of a checkout: reports where it was imported from, here and in loader processes.
MODULE = """
import importlib.util, multiprocessing, sys

def report():
    shadowing = [name for name in ("commands", "config", "data", "model", "run") if importlib.util.find_spec(name)]
    print(__file__, shadowing, flush=True)

def main():
    report()
    for method in sys.argv[1:]:
        process = multiprocessing.get_context(method).Process(target=report)
        process.start()
        process.join()
    return 0
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A second checkout, which is not installed; the first one is."""
    commands = tmp_path / "checkout" / "trainer" / "commands"
    commands.mkdir(parents=True)
    for folder in (commands, commands.parent, *(commands.parent / name for name in ("config", "data", "model", "run"))):
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    for name in NAMES:
        shutil.copy(REPOSITORY / "trainer" / f"{name}.py", commands.parent)
        (commands / f"{name}.py").write_text(MODULE)
    return tmp_path / "checkout"


@pytest.mark.parametrize(
    ("name", "before"),
    [
        *((name, before) for name in NAMES for before in ([], ["-P"])),
        pytest.param("train", [*LAUNCHER, *tiny.launch_options(1), "--cpu"], marks=pytest.mark.slow, id="launched"),
    ],
)
def test_a_script_and_its_loader_processes_import_their_own_checkout(
    checkout: Path, name: str, before: list[str]
) -> None:
    """Run from another folder, with the first checkout on PYTHONPATH, as an installation would put it."""
    methods = ["spawn", "forkserver"] if name == "train" else []
    command = [sys.executable, *before, str(checkout / "trainer" / f"{name}.py"), *methods]
    done = subprocess.run(command, env=tiny.environment(), cwd=os.sep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{checkout}/trainer/commands/{name}.py []"] * (1 + len(methods))
