"""An installation in an environment of its own, used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.scenes import SceneTruth
from tests.support import REPOSITORY

Run = Callable[..., subprocess.CompletedProcess]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a command of a fresh environment in an empty folder; the dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    for name in ("maskstream", "shards", "builder", "trainer", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    venv.create(folder / "venv")
    python = str(folder / "venv" / "bin" / "python")
    packages = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", str(source)], check=True)
    shutil.rmtree(source)
    empty = folder / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess:
        words = [str(folder / "venv" / "bin" / command), *arguments]
        return subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True, timeout=250)

    return run


@pytest.mark.parametrize("command", ["maskstream", "build-shards", "inspect-shards"])
def test_scripts_are_installed_and_know_their_version(run: Run, command: str) -> None:
    done = run(command, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.1.0" in done.stdout


def test_the_installed_code_is_used(run: Run) -> None:
    done = run("python", "-c", "import maskstream, shards, trainer; print(maskstream.__file__, trainer.__path__[0])")
    assert str(REPOSITORY) not in done.stdout
    assert done.stdout.count("site-packages") == 2


def test_every_command_in_an_empty_folder(run: Run, scenes: SceneTruth, tmp_path: Path) -> None:
    shards, folder = str(tmp_path / "shards"), str(tmp_path / "run")

    def output(command: str, *arguments: str) -> str:
        done = run(*command.split(), *arguments)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    sources = ["--images", str(scenes.images), "--annotations", str(scenes.annotations), "--no-cache"]
    output("build-shards --per-class 4 --eval-per-class 2 --workers 1", *sources, "--out", shards)
    counts = json.loads(output("maskstream inspect --json", shards))
    assert [split["split"] for split in counts["splits"]] == ["train", "val", "test"]
    output("inspect-shards", shards, "--html", str(tmp_path / "page.html"))

    small = "--config demo --data.batch_size 2 --data.workers 0 --data.min_size 64"
    small += " --train.epochs 1 --train.steps_per_epoch 1 --run.trackers []"
    output(f"maskstream train {small}", "--data.shards", shards, "--run.dir", folder)
    output("maskstream evaluate --data.split val", "--checkpoint", folder, "--data.shards", shards)
    picture = next(Path(scenes.images).rglob("*.jpg"))
    output("maskstream predict", "--checkpoint", folder, "--out", str(tmp_path / "found"), str(picture))
    assert list((tmp_path / "found").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "trafic"], "traffic"),
        (["train", "--data.shards", "nowhere"], "nowhere"),
        (["inspect", "nowhere"], "dataset.json"),
        (["build", "--per-class", "none"], "--per-class"),
        (["compare", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(run: Run, arguments: list[str], message: str) -> None:
    done = run("maskstream", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
