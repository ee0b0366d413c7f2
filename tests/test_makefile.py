"""The Makefile, without any installation."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_an_old_python_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || exit 9\n'
        f"exec {sys.executable} -c \"import sys; sys.version_info, sys.version = (3, 10, 12), '3.10.12'; $2\"\n"
    )
    old.chmod(0o755)
    for target in ("demo", "check"):
        command = ["make", "--no-print-directory", target, f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 2
        assert f"{old} is Python 3.10.12, maskstream needs 3.11 or newer" in done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "venv").exists()
