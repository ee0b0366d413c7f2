"""The notebook runs as it stands, from the local S3 server: with small pictures and few steps."""

import os
import sys
from pathlib import Path

import pytest

from demo.scenes import SceneTruth
from tests.support import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "traffic.ipynb"
SMALL = """
PER_CLASS = 4
CLASSES = ["Person", "Car"]
CLASS_NAMES = "Person Car"
MIRROR = "--images s3://open-images-dataset --annotations s3://openimages"
RECIPE = "--config demo --data.batch_size 2 --data.min_size 64 --data.max_size 64 --train.epochs 1"
RECIPE += " --train.steps_per_epoch 2"
"""


def test_the_notebook_runs_from_the_dry_run_to_a_picture(
    s3_scenes: SceneTruth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)
    assert cells[0].source.startswith("%pip install")
    cells[0].source = "import maskstream"
    cells[1].source += SMALL
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    def printed(start: str) -> str:
        [cell] = [cell for cell in cells if cell.source.startswith(start)]
        return "".join(output.get("text", "") for output in cell.outputs)

    assert "Open Images masks" in printed("!maskstream evaluate")
    shown = [output.get("data", {}) for cell in cells for output in cell.outputs]
    assert (
        sum("image/png" in data or "image/jpeg" in data for data in shown) == 4 + 1 + 1
    )  # samples, curves, detections
    for path in ("shards/dataset.json", "run/curves.png", "found/predictions.json"):
        assert (tmp_path / "work" / path).exists(), path
