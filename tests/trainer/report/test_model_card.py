import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from shards.format.dataset import Category, open_dataset
from trainer.config.settings import Config
from trainer.model.checkpoint import open_checkpoint
from trainer.report.model_card import FOLDER, model_card
from trainer.run.runlog import environment

STEPS = [{"step": step, "seconds": 30.0, "images": 12} for step in (1, 2, 3)]


def evaluation(step: int, ap: float | None) -> dict[str, Any]:
    classes = [{"name": name, "ap": ap, "ap50": None, "objects": 3} for name in ("Square|Disc", "<b>")]
    scores = {"ap": ap, "ap50": None, "classes": classes}
    return {"step": step, "split": "val", "images": 5, "boxes": 6, "masks": 6, "bbox": scores, "segm": scores}


def card(dataset: Path, evaluations: list[dict[str, Any]], source: str = "") -> tuple[dict[str, Any], str]:
    """The front matter and the text."""
    opened = open_dataset(str(dataset))
    categories = (Category(1, "Square|Disc", ""), Category(2, "<b>", ""))
    info = replace(opened.info, source={"name": source}, categories=categories)
    config, machine = Config(), environment(Accelerator(cpu=True))
    config.data.shards, config.model.weights = "s3://key:secret@bucket/traffic", "coco"
    named = replace(opened, info=info)
    text = model_card(config, named, 24, STEPS, evaluations, machine, ["few masks: <b> (1 of 9 objects)"])
    _, front, body = text.split("---\n", 2)
    assert "secret" not in text
    assert "<b>" not in body
    value: dict[str, Any] = yaml.safe_load(front)
    return value, body


def test_a_card_has_the_best_evaluation_and_what_was_trained(dataset: Path) -> None:
    front, text = card(dataset, [evaluation(1, 0.25), evaluation(2, 0.5), evaluation(3, 0.25)], "Open Images")
    [entry] = front["model-index"]
    assert [metric["value"] for metric in entry["results"][0]["metrics"]] == [50.0, 50.0]  # box and mask, no AP50
    assert "open-images" in front["tags"]
    assert "license" not in front  # that of the data is not that of the weights
    for expected in (
        "| data | 24 images of the split train of s3://\\*\\*\\*@bucket/traffic |",
        "| training | 3 steps in 0:01:30, 36 images, which is each 1.5 times |",
        "on 5 images of the split val, after step 2:",
        r"| Square\|Disc | 3 | 3 | 50.0 | - | 50.0 | - |",
        "| mean | 6 | 6 | 50.0 | - | 50.0 | - |",
        "The best of 3 evaluations",
        "best/step-000002/model.safetensors",
        "few masks: &lt;b&gt; (1 of 9 objects)",
        "under\n[CC BY 4.0]",
    ):
        assert expected in text, text


def test_the_code_of_a_card_builds_the_network(dataset: Path, checkpoint: Path) -> None:
    front, text = card(dataset, [])
    assert "model-index" not in front
    assert "The run had no evaluation." in text
    [code] = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {"image": torch.zeros(3, 40, 50)}
    exec(code.replace(FOLDER, str(checkpoint)), names)
    assert set(names["found"]) == {"boxes", "labels", "scores", "masks"}
    weights = names["network"].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in open_checkpoint(str(checkpoint)).weights.items())
