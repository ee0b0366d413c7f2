"""The example runs as it stands, in a process without a display."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support import sample, write_dataset

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "look_into_shards.py"


def test_the_example_tells_counts_and_leaves_pictures(tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "data", {"train": [sample(n) for n in range(12)], "val": [sample(n) for n in range(12, 15)]}
    )
    hidden = ("DISPLAY", "WAYLAND_DISPLAY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"SHARDS": str(tmp_path / "data"), "OUT": str(tmp_path / "look"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = [line.split() for line in done.stdout.splitlines() if "Person" in line or "Car" in line]
    assert counts == [
        ["1", "Person", "15", "15", "15", "0", "15", "0", "0.0"],
        ["2", "Car", "7", "7", "0", "0", "7", "7", "1.0"],
    ]
    pictures = sorted((tmp_path / "look").iterdir())
    assert len(pictures) == 8 + 2
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 100 or path.name == "instances.png"


def test_it_is_made_of_cells() -> None:
    lines = EXAMPLE.read_text().splitlines()
    assert lines[0] == "# %% [markdown]"
    assert lines.count("# %%") >= 5
