"""The model card: a run's `README.md` with the front matter that Hugging Face reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import yaml

from shards.common.redact import redact
from shards.common.text import counted
from shards.common.version import __version__
from shards.format.dataset_card import ABOUT, escaped
from trainer.config.settings import Config
from trainer.run.best import best_evaluation

if TYPE_CHECKING:
    from shards.format.dataset import Dataset

    Row = Mapping[str, Any]

FOLDER = "path/of/this/folder"
# Titles of scores, and their keys in a row of evaluations.jsonl.
SCORES = {
    f"{title} {suffix}": (kind, name)
    for title, kind in (("box", "bbox"), ("mask", "segm"))
    for suffix, name in (("AP", "ap"), ("AP50", "ap50"))
}

_TEXT = """\
# Mask R-CNN: {names}

torchvision's Mask R-CNN with the backbone {backbone}, which finds and segments objects of {classes}.

| | |
| --- | --- |
{facts}

`config.yaml` has all settings, `metrics.csv` every step, `curves.png` losses, AP and learning rate.

## Results

{results}

## Use

    maskstream predict --checkpoint {weights} --out predictions street.jpg
    maskstream export {weights} --to onnx --out model.onnx

```python
from trainer.model.build import rebuild  # of maskstream
from trainer.model.checkpoint import open_checkpoint

network = rebuild(open_checkpoint("{weights}")).eval()  # torchvision.models.detection.MaskRCNN
[found] = network([image])  # RGB, float32 [3, H, W] from 0 to 1; boxes, labels, scores, masks
```

`{file}` is a `state_dict` under torchvision's names, which torchvision loads with
`strict=True`: `docs/models.md` of maskstream builds the network from torchvision alone. Its metadata has the
classes and the settings of the network.

## Limits

- Objects of other classes are not found. How the network does on images unlike those of its data is not known.
- Images are resized to a shorter side of {min_size} pixels, or less if the longer one would exceed {max_size}; what is
  then only a few pixels wide is missed.
- At most {most} objects per image are found. EXIF orientation is ignored, as in training.
{warnings}
## Licence

No licence was chosen for the weights: add `license` to the front matter before you distribute them.
{attribution}"""


def model_card(
    config: Config,
    dataset: Dataset,
    images: int,
    rows: Sequence[Row],
    evaluations: Sequence[Row],
    environment: Row,
    warnings: Sequence[str],
) -> str:
    """Return the text of a finished run's `README.md`.

    Args:
        config: the settings.
        dataset: with the classes of the network.
        images: number of images that the run samples from.
        rows: of metrics.jsonl, at least one.
        evaluations: rows of evaluations.jsonl; none without an evaluation.
        environment: the content of environment.json.
        warnings: about classes with few masks.
    """
    about = ABOUT.get(dataset.info.source.get("name", ""))
    names = ", ".join(category.name for category in dataset.categories)
    best = best_evaluation(evaluations) if evaluations else None
    weights = "best" if best else "checkpoints"
    step = (best or rows[-1])["step"]
    front: dict[str, Any] = {
        "library_name": "torchvision",
        "pipeline_tag": "image-segmentation",
        "tags": ["mask-rcnn", "instance-segmentation", "object-detection", *([about.tag] if about else [])],
    }
    if best:
        front["model-index"] = [_index_entry(names, f"{about.title}: {names}" if about else names, best)]
    facts = _facts(config, dataset, images, rows, environment)
    text = _TEXT.format(
        names=escaped(names),
        backbone=config.model.backbone,
        classes=counted(len(dataset.categories), "class", "classes"),
        facts="\n".join(f"| {title} | {escaped(value)} |" for title, value in facts.items()),
        results=_results(best, len(evaluations)) if best else "The run had no evaluation.",
        weights=f"{FOLDER}/{weights}",
        file=f"{weights}/step-{step:06d}/model.safetensors",
        warnings="".join(f"- In the training data: {escaped(warning)}.\n" for warning in warnings),
        min_size=config.data.min_size,
        max_size=config.data.max_size,
        most=config.model.detections_per_image,
        attribution=f"\n{about.attribution}\n" if about else "",
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{text}"


def _index_entry(names: str, data: str, best: Row) -> dict[str, Any]:
    """Return the entry of Hugging Face's `model-index` with the AP of an evaluation, in per cent."""
    metrics = [
        {"type": "mean_average_precision", "name": title, "value": round(100 * best[kind][name], 1)}
        for title, (kind, name) in SCORES.items()
        if best[kind][name] is not None
    ]
    task = {"type": "image-segmentation", "name": "instance segmentation"}
    result = {"task": task, "dataset": {"type": "maskstream", "name": data, "split": best["split"]}, "metrics": metrics}
    return {"name": f"Mask R-CNN: {names}", "results": [result]}


def _facts(config: Config, dataset: Dataset, images: int, rows: Sequence[Row], environment: Row) -> dict[str, str]:
    """Return what was trained on what, for how long and with what, by title."""
    data, train, versions = config.data, config.train, environment["packages"]
    seconds, seen = (sum(row[name] for row in rows) for name in ("seconds", "images"))
    device = environment["gpus"][0] if environment["device"].startswith("cuda") else environment["cpu"]
    stages = [f"{stage.layers} ({counted(stage.epochs, 'epoch')})" for stage in train.stages]
    return {
        "classes": ", ".join(f"{category.id} {category.name}" for category in dataset.categories),
        "data": redact(f"{counted(images, 'image')} of the split {data.split} of {data.shards}"),
        "initial weights": redact(config.model.weights),
        "trained layers": ", then ".join(stages) or train.layers,
        "training": f"{counted(len(rows), 'step')} in {timedelta(seconds=round(seconds))}, {counted(seen, 'image')}, "
        f"which is each {seen / images:.1f} times",
        "machine": f"{counted(environment['world_size'], 'process', 'processes')} on {device}, mixed precision "
        f"{environment['mixed_precision']}",
        "software": f"maskstream {__version__}, torch {versions['torch']}, torchvision {versions['torchvision']}",
    }


def _results(best: Row, evaluations: int) -> str:
    """Return the table of an evaluation, and what it is worth."""

    def line(name: str, objects: int, masks: int, of: Mapping[str, Row]) -> str:
        aps = [of[kind][key] for kind, key in SCORES.values()]
        cells = [name, objects, masks, *("-" if ap is None else f"{100 * ap:.1f}" for ap in aps)]
        return f"| {' | '.join(map(str, cells))} |"

    classes = zip(best["bbox"]["classes"], best["segm"]["classes"], strict=True)
    lines = [
        f"COCO's AP in per cent, on {counted(best['images'], 'image')} of the split {best['split']}, after step "
        f"{best['step']}:",
        "",
        f"| class | objects | with a mask | {' | '.join(SCORES)} |",
        "| --- |" + " ---: |" * (2 + len(SCORES)),
        *(
            line(escaped(box["name"]), box["objects"], mask["objects"], {"bbox": box, "segm": mask})
            for box, mask in classes
        ),
        line("mean", best["boxes"], best["masks"], best),
    ]
    if evaluations > 1:
        lines += ["", f"The best of {evaluations} evaluations on the same images: expect a little less on others."]
    return "\n".join(lines)
