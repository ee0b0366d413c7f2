"""The commands of docs/inspecting.md run as they are."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from shards.inspect.cli import main
from tests.support import REPOSITORY, sample, write_dataset

GUIDE = REPOSITORY / "docs" / "inspecting.md"
COMMANDS = [line.strip() for line in GUIDE.read_text().splitlines() if line.startswith("    inspect-shards ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_guide(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = replace(sample(1), image_id="000a1249af2bc5f0")
    write_dataset("traffic", {"train": [sample(0), named], "val": [sample(2)]})
    before = set(tmp_path.iterdir())
    assert main(shlex.split(command.replace("s3://bucket/traffic", "traffic"))[1:]) == 0
    written = {path.name for path in set(tmp_path.iterdir()) - before}
    assert written == ({"traffic.html"} if "--html" in command else {"look"} if "--extract" in command else set())
