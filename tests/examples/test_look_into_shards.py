"""The example runs as it stands, in a process without a display."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support import REPOSITORY, sample, write_dataset

EXAMPLE = REPOSITORY / "examples" / "look_into_shards.py"


def test_the_example_prints_counts_and_writes_pictures(tmp_path: Path) -> None:
    samples = [sample(n) for n in range(15)]
    write_dataset(tmp_path / "data", {"train": samples[:12], "val": samples[12:]})
    hidden = ("DISPLAY", "WAYLAND_DISPLAY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"SHARDS": str(tmp_path / "data"), "OUT": str(tmp_path / "look"), "PYTHONPATH": str(REPOSITORY)}
    output = subprocess.check_output([sys.executable, str(EXAMPLE)], env=environment, cwd=tmp_path, text=True)
    counts = [line.split() for line in output.splitlines() if "Person" in line or "Car" in line]
    assert counts == [
        ["1", "Person", "15", "15", "15", "0", "0", "15", "0", "0.0"],
        ["2", "Car", "7", "7", "0", "0", "0", "7", "7", "1.0"],
    ]
    pictures = sorted((tmp_path / "look").iterdir())
    assert len(pictures) == 8 + 2
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 100 or path.name == "instances.png"
    lines = EXAMPLE.read_text().splitlines()
    assert (lines[0], lines.count("# %%") >= 5) == ("# %% [markdown]", True)  # cells for an editor
