"""An installation in an environment of its own, used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from demo.scenes import SceneTruth
from tests.support import REPOSITORY

pytestmark = pytest.mark.slow


DEPENDENCIES = "dependencies.pth"

Run = Callable[..., subprocess.CompletedProcess[str]]


def install(folder: Path) -> Run:
    """Install the package; its dependencies are those of this environment.

    Returns a function that runs its commands in an empty folder.
    """
    source, empty = folder / "source", folder / "empty"
    empty.mkdir()
    for name in ("maskstream", "shards", "builder", "trainer", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    venv.create(folder / "venv")
    (packages_of(folder) / DEPENDENCIES).write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "venv" / "bin" / "python")]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "install", *options, str(source)], check=True)
    shutil.rmtree(source)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        program, *words = command.split()
        command_line = [str(folder / "venv" / "bin" / program), *words, *arguments]
        return subprocess.run(command_line, cwd=empty, env=environment, capture_output=True, text=True, timeout=250)

    return run


def packages_of(folder: Path) -> Path:
    """The folder of the installed packages of an environment."""
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a command of a fresh environment in an empty folder, and return what it prints."""
    folder = tmp_path_factory.mktemp("install")
    run = install(folder)

    def output(command: str, *arguments: str) -> str:
        done = run(command, *arguments)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    return output


def reduce_dependencies(packages: Path) -> None:
    """Reduce the dependencies in an environment to what the package and those require, without extras."""
    (packages / DEPENDENCIES).unlink()
    waiting = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    done = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name in done or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        done.add(requirement.name)
        distribution = metadata.distribution(requirement.name)
        waiting += distribution.requires or []
        for name in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(distribution.locate_file(name))))


def test_building_and_inspecting_need_no_torch(scenes: SceneTruth, tmp_path: Path) -> None:
    run = install(tmp_path)
    reduce_dependencies(packages_of(tmp_path))
    sources = ["--images", str(scenes.images), "--annotations", str(scenes.annotations), "--no-cache"]
    for command in (
        ["build-shards", "--per-class", "4", *sources, "--out", "shards"],
        ["inspect-shards", "shards", "--verify"],
        ["inspect-shards", "shards", "--html", "page.html"],
        ["maskstream", "export", "shards", "--to", "yolo", "--out", "yolo"],
        ["maskstream", "classes", *sources],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    to_torchvision = "from maskstream import open_dataset; open_dataset('shards').to_torchvision('train')"
    for command, needs in (
        (["python", "-c", "import torch"], "No module named 'torch'"),
        (["python", "-c", "from maskstream import ShardStream"], "ShardStream needs torch: pip install '.[train]'"),
        (["python", "-c", to_torchvision], "to_torchvision needs torch: pip install '.[train]'"),
        (["maskstream", "train", "--data.shards", "shards"], "train: error: torch is not installed: pip install '.["),
    ):
        done = run(*command)
        assert done.returncode != 0
        assert needs in done.stderr


def test_scripts_are_installed_and_use_the_installed_code(output: Callable[..., str]) -> None:
    for command in ("maskstream", "build-shards", "inspect-shards"):
        assert "0.1.0" in output(command, "--version")
    places = output("python", "-c", "import maskstream, trainer; print(maskstream.__file__, trainer.__path__[0])")
    assert str(REPOSITORY) not in places
    assert places.count("site-packages") == 2


RUN_ALL = """
import contextlib, io, json, sys
from maskstream.cli import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    sys.__stdout__.write(json.dumps([code or 0, out.getvalue(), err.getvalue()]) + chr(10))
"""


def test_the_whole_way_in_an_empty_folder(output: Callable[..., str], scenes: SceneTruth) -> None:
    sources = ["--images", str(scenes.images), "--annotations", str(scenes.annotations), "--no-cache"]
    small = "--config demo --model.backbone mobilenet_v2 --data.batch_size 2 --data.workers 0 --data.min_size 64"
    small += " --train.epochs 1 --train.steps_per_epoch 2 --run.trackers []"
    few = ["--per-class", "4", "--eval-per-class", "2", "--workers", "1", "--out", "shards"]
    picture = str(next(Path(scenes.images).rglob("*.jpg")))
    train = ["train", *small.split(), "--data.val_split", "", "--data.shards"]
    way = [  # each command as it should be, and with a wrong input
        (["classes", *sources], ["classes", *sources, "--classes", "Persn"]),
        (["build", *few, *sources, "--dry-run"], ["build", *few, *sources, "--dry-run", "--classes", "Persn"]),
        (["build", *few, *sources], ["build", *few, *sources[:2], "--annotations", "nowhere"]),
        (["inspect", "--json", "shards"], ["inspect", "shard"]),
        (["inspect", "shards", "--html", "page.html"], ["inspect", "shards", "--htm", "page.html"]),
        ([*train, "shards", "--run.dir", "run"], [*train, "shards", "--run.dir", "run2", "--optim.lr", "fast"]),
        (["evaluate", "--data.split", "val", "--checkpoint", "run"], ["evaluate", "--checkpoint", "page.html"]),
        (["predict", "--checkpoint", "run", "--out", "found", picture], ["predict", "--checkpoint", "run", "no.jpg"]),
        (["export", "shards", "--to", "coco", "--out", "coco"], ["export", "shards", "--to", "voc", "--out", "voc"]),
    ]
    # In one process, because each takes seconds to import torch.
    lines = output("python -c", RUN_ALL, json.dumps([arguments for pair in way for arguments in pair])).splitlines()
    done = [json.loads(line) for line in lines]
    assert len(done) == 2 * len(way)
    for (right, wrong), (code, printed, err), failed in zip(way, done[::2], done[1::2], strict=True):
        assert code == 0, (right, err)
        assert printed or right[0] in ("train", "predict")
        code, _, err = failed
        assert code in (1, 2), wrong
        assert len(err.splitlines()) == 1 or err.startswith("usage:"), (wrong, err)
        assert "rror: " in err.splitlines()[-1], (wrong, err)
    counts = json.loads(done[2 * [right[0] for right, _ in way].index("inspect")][1])
    assert [split["split"] for split in counts["splits"]] == ["train", "val", "test"]
    files = output("python -c", "import glob; print(*glob.glob('**', recursive=True))").split()
    assert {"shards/dataset.json", "page.html", "run/curves.png", "found/predictions.json", "coco/test"} <= set(files)
