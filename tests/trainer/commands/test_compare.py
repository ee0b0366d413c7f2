import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from shards.storage.location import Location
from tests.support import REPOSITORY
from tests.trainer import tiny
from trainer.commands import compare as script
from trainer.commands import train
from trainer.config.settings import ConfigError
from trainer.config.yaml_config import load_config

CONFIGS = REPOSITORY / "configs"


def options(path: Path | str, **overrides: str) -> argparse.Namespace:
    return argparse.Namespace(comparison=str(path), config=None, **overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("compare-*.yaml")), ids=lambda path: path.stem)
def test_packaged_comparisons_are_valid(path: Path) -> None:
    configs = script.read_comparison(options(path))
    assert len(configs) == 3
    assert len({json.dumps(config.to_dict()) for config in configs.values()}) == 3
    base = load_config(str(CONFIGS / "traffic-coco.yaml"))
    assert all(config.model == base.model and config.optim == base.optim for config in configs.values())


def test_changes_override_the_command_line_which_overrides_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {epochs: 3}\noptim: {lr: 0.1, momentum: 0.5}\n")
    (tmp_path / "c.yaml").write_text("base: base.yaml\nsettings: {low: {optim: {lr: 0.01}}, same: }\n")
    configs = script.read_comparison(options(tmp_path / "c.yaml", **{"optim.lr": "0.5", "train.seed": "7"}))
    found = {name: (c.optim.lr, c.optim.momentum, c.train.seed) for name, c in configs.items()}
    assert found == {"low": (0.01, 0.5, 7), "same": (0.5, 0.5, 7)}
    (tmp_path / "elsewhere.yaml").write_text(f"base: {tmp_path}/base.yaml\nsettings: {{same: }}\n")
    assert script.read_comparison(options(tmp_path / "elsewhere.yaml"))["same"].optim.momentum == 0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"settings": {"a": {}, "b": {"train": {"epochs": 3}}}}, "the same number of images per GPU: a 8000, b 2400"),
        ({"settings": {"a b": {}, "a-b": {}}}, "two names make the same folder: a b, a-b"),
        ({"settings": {"a": {"optim": {"rate": 1}}}}, "c.yaml: a: unknown option 'optim.rate'"),
        ({"settings": {}}, "there are no settings"),
        ({"runs": {}}, "must hold 'settings:'"),
    ],
)
def test_a_wrong_comparison_is_one_line(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises(ConfigError, match=message):
        script.read_comparison(options(tmp_path / "c.yaml"))


def test_help_does_not_offer_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help-all"])
    assert "resume" not in capsys.readouterr().out


def evaluation(step: int, mask: float | None, box: float) -> dict[str, Any]:
    return {"step": step, "segm": {"ap": mask, "ap50": mask and mask + 0.1}, "bbox": {"ap": box, "ap50": box}}


@pytest.mark.parametrize(
    ("evaluations", "cells"),
    [
        ([evaluation(2, 0.3, 0.4), evaluation(4, 0.25, 0.45)], "45.0 | 25.0 | 35.0 | 30.0 | 2"),
        # Without masks the best evaluation is the one with the highest box AP, as for the weights in best/.
        ([evaluation(step, None, ap) for step, ap in ((2, 0.3), (4, 0.5), (6, 0.4))], "40.0 | - | - | - | 4"),
    ],
)
def test_the_table_has_the_last_and_the_best_evaluation(
    tmp_path: Path, evaluations: list[dict[str, Any]], cells: str
) -> None:
    run = Location(str(tmp_path))
    (run / "evaluations.jsonl").write("\n".join(map(json.dumps, evaluations)).encode())
    (run / "metrics.jsonl").write(b'{"images": 8, "seconds": 30}\n{"images": 8, "seconds": 90}\n')
    lines = script.table([script.summarize("heads", *script.read_run("heads", run))]).splitlines()
    assert lines[0].startswith("| setting | box AP | mask AP |")
    assert lines[2] == f"| heads | {cells} | 0.1 | 2.0 |"


def test_a_comparison_trains_all_settings_and_names_one_that_fails(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # `test_launcher.py` launches real processes.
    monkeypatch.setattr(script, "launch", lambda path, arguments, options, noted: train.main(arguments))
    settings = {"heads first": {"train": {"stages": [{"layers": "heads"}, {"layers": "all"}]}}, "all": {}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"settings": settings}, sort_keys=False))
    options = tiny.arguments(dataset, tmp_path / "runs", train__epochs=2, train__steps_per_epoch=1)
    words = [str(tmp_path / "c.yaml"), *options]
    assert script.main(words) == 0
    assert "| heads first |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "runs/compare.json").read_text())
    assert [row["setting"] for row in rows] == ["heads first", "all"]
    assert (tmp_path / "runs/compare.png").read_bytes().startswith(b"\x89PNG")
    assert len(tiny.rows(tmp_path / "runs/heads-first/metrics.jsonl")) == 2

    assert script.main([*words, "--data.shards", str(tmp_path)]) == 2
    assert "compare: error: heads first: the training ended with status 2" in capsys.readouterr().err
