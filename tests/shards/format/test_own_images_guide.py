from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shards.inspect.cli import main
from tests.support import REPOSITORY, jpeg, run_examples


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(jpeg(48, 32, 0))
    mask = np.zeros((32, 48), np.bool_)
    mask[4:9, 6:12] = True
    content: dict[str, Any] = {"file": "a.jpg", "cat_masks": [mask], "dog_boxes": [(1, 2, 30, 20)]}
    pets = [SimpleNamespace(name=f"pet-{number}", **content) for number in range(25)]
    names: dict[str, Any] = {"training_pets": pets[:20], "validation_pets": pets[20:]}
    assert run_examples("your-own-images.md", names)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] in (REPOSITORY / "docs" / "your-own-images.md").read_text("utf-8")
    assert "pet-3" in printed
    assert names["masks"].shape == (2, 32, 48)
    assert main(["data/pets", "--verify"]) == 0
    assert main(["data/pets", "--html", "pets.html"]) == 0
