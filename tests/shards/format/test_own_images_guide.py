"""Every example of docs/your-own-images.md, run one after the other."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shards.inspect.cli import main
from tests.support import REPOSITORY, jpeg

GUIDE = REPOSITORY / "docs" / "your-own-images.md"


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(jpeg(48, 32, 0))
    mask = np.zeros((32, 48), np.bool_)
    mask[4:9, 6:12] = True
    pets = [
        SimpleNamespace(name=f"pet-{number}", file="a.jpg", cat_masks=[mask], dog_boxes=[(1, 2, 30, 20)])
        for number in range(25)
    ]
    names: dict[str, object] = {"training_pets": pets[:20], "validation_pets": pets[20:]}
    text = GUIDE.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile("\n" * text.count("\n", 0, block.start(1)) + block[1], str(GUIDE), "exec"), names)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] in text
    assert "pet-3" in printed
    assert names["masks"].shape == (2, 32, 48)  # type: ignore[attr-defined]
    assert main(["data/pets", "--verify"]) == 0
    assert main(["data/pets", "--html", "pets.html"]) == 0
