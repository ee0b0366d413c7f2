"""The scripts in trainer/ import the packages of their own checkout, however they are started."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tests.trainer import tiny

NAMES = ("train", "evaluate", "predict", "compare")

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


def run(*words: object) -> list[str]:
    """Run python from another folder, with the first checkout on PYTHONPATH, as an installation would put it."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=tiny.environment(), cwd=os.sep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("safe_path", [[], ["-P"]], ids=["default", "safe-path"])
@pytest.mark.parametrize("name", NAMES)
def test_a_script_and_its_loader_processes_import_their_own_checkout(
    checkout: Path, name: str, safe_path: list[str]
) -> None:
    expected = f"{checkout}/trainer/commands/{name}.py []"
    methods = ["spawn", "forkserver"] if name == "train" else []
    lines = run(*safe_path, checkout / "trainer" / f"{name}.py", *methods)
    assert lines == [expected] * (1 + len(methods))


@pytest.mark.slow
def test_a_launched_script_imports_its_own_checkout(checkout: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", *tiny.launch_options(1), "--cpu"]
    lines = run(*launch, checkout / "trainer" / "train.py", "spawn")
    assert lines == [f"{checkout}/trainer/commands/train.py []"] * 2
