"""`maskstream export --to onnx`: onnxruntime finds in an image what torchvision's network finds."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskstream import cli
from shards.export.cli import main as export_dataset
from shards.storage.location import Location
from tests.trainer import tiny
from trainer.commands import train
from trainer.model.build import build_model, rebuild
from trainer.model.checkpoint import State, description, save

onnxruntime = pytest.importorskip("onnxruntime")

# Of images: smaller and larger than the network sees, thin, and two that float32 would resize to one row less.
SIZES = ((60, 72), (72, 60), (441, 588), (393, 588), (31, 200), (300, 41))
GROUP_V2 = {"model__version": "v2", "model__norm": "group", "model__mask_head": "agnostic"}


def write_random_network(run: Path, dataset: Path, seed: int, contrast: float, **changes: object) -> State:
    """A checkpoint with random weights, whose scores differ so much that their order does not hinge on a rounding."""
    settings = {"model__backbone": "resnet18", "data__min_size": 144, "data__max_size": 192, **changes}
    config = train.parse(tiny.arguments(dataset, run, model__score_threshold=0.51, **settings))
    torch.manual_seed(seed)
    network = build_model(config.model, config.data, 3)
    heads = network.roi_heads
    with torch.no_grad():
        for layer in (network.rpn.head.cls_logits, heads.box_predictor.cls_score):
            layer.weight.mul_(contrast)
        heads.mask_predictor.mask_fcn_logits.weight.mul_(30 * contrast)
    state = State(1, 1, {}, tiny.CATEGORIES, config, network.state_dict(), None)
    save(Location(str(run)), state, keep=1)
    return state


def blots(height: int, width: int, seed: int) -> torch.Tensor:
    """An image of coloured blots, uint8 [3, height, width]."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    return (image * 255).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("seed", "contrast", "changes"), [(2, 10, {}), (3, 3, GROUP_V2)], ids=["v1", "v2"])
def test_onnxruntime_finds_what_torchvision_finds(
    seed: int,
    contrast: float,
    changes: dict[str, object],
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = tmp_path / "run", tmp_path / "model.onnx"
    state = write_random_network(run, dataset, seed, contrast, **changes)
    assert cli.main(["export", str(run), "--to", "onnx", "--out", str(out)]) == 0
    *_, open_session, _, find = capsys.readouterr().out.splitlines()  # the printed example, with another image
    names: dict[str, Any] = {"onnxruntime": onnxruntime}
    exec(open_session, names)
    network, counts, pixels = rebuild(state).eval(), [], 0
    for number, size in enumerate(SIZES):
        image = blots(*size, number)
        found: dict[str, Any] = {}
        exec(find, names | {"image": image.numpy()}, found)
        with torch.no_grad():
            expected = {name: value.numpy() for name, value in network([image / 255])[0].items()}
        np.testing.assert_array_equal(found["labels"], expected["labels"])
        np.testing.assert_allclose(found["boxes"], expected["boxes"], rtol=0, atol=0.01)
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=0, atol=1e-4)
        probabilities = expected["masks"][:, 0]
        is_clear = abs(probabilities - 0.5) > 0.01
        np.testing.assert_array_equal(found["masks"][is_clear], probabilities[is_clear] > 0.5)
        counts.append(len(found["boxes"]))
        pixels += found["masks"].sum()
    assert min(counts) == 0 < 5 < max(counts)
    assert pixels > 1000
    metadata = names["session"].get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == {"1": "Square", "2": "Disc"}
    assert json.loads(metadata["maskstream"]) == description(state)


def test_errors_are_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    existing, new = tmp_path / "old.onnx", tmp_path / "new.onnx"
    existing.touch()
    for run, out, problem in (
        (checkpoint, existing, "old.onnx: it exists already: delete it, or give another name"),
        (tmp_path, new, "there is no checkpoint: give a run's folder"),
    ):
        assert cli.main(["export", str(run), "--to=onnx", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("export: error: ")
        assert problem in error
        assert error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert cli.main(["export", str(checkpoint), "--to", "onnx", "--out", str(new)]) == 2
    assert capsys.readouterr().err == "export: error: onnx is not installed: pip install '.[onnx]'\n"
    assert export_dataset(["run", "--to", "onnx", "--out", str(new)]) == 2
    assert "maskstream export CHECKPOINT --to onnx --out FILE" in capsys.readouterr().err
    assert not new.exists()
