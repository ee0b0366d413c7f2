"""Cost of evaluating 5,000 images of 100 detections: this package's metrics compared with pycocotools.

    python benchmarks/evaluating.py                    # some minutes, about 4 GB for pycocotools
    python benchmarks/evaluating.py --images 500

Images of 1024 x 768 with ten objects each, of ten classes, six of them with a mask; detections near them and far away,
all masks as RLE, seeded. (The shapes repeat after 20 images, the scores do not.) Each line of the Markdown table is a
separate process: its processor time, and the increase of its peak memory (VmHWM) over the memory before.

This package's metrics process one image after the other, as in an evaluation. pycocotools is used as in its
documentation: all annotations, all results through `loadRes`. The twelve numbers must agree to 1e-9, or the benchmark
fails. It needs Linux (/proc/self/status).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from trainer.metrics.coco import SUMMARY, TASKS, CocoMetric, ground_truth
from trainer.metrics.openimages import OpenImagesMetric
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.inference import Detections

WIDTH, HEIGHT, DETECTIONS, OBJECTS, SHAPES = 1024, 768, 100, 10, 20
CATEGORIES = tuple(Category(i, f"class {i}", f"/m/{i}") for i in range(1, 11))
PARTS = {
    "pycocotools, boxes and masks": "peer",
    "COCO, boxes and masks": "coco",
    "pycocotools, masks only": "peer-masks",
    "Open Images": "open-images",
}


Box = tuple[float, float, float, float]  # x, y, width, height in pixels


def shape(rng: np.random.Generator, x: float, y: float, w: float, h: float) -> tuple[Box, rle.Rle]:
    """Return the box x, y, w, h and the mask of a blob that is clipped to the image."""
    left, top = int(min(max(x, 0), WIDTH - 9)), int(min(max(y, 0), HEIGHT - 9))
    w, h = int(min(max(w, 8), WIDTH - left)), int(min(max(h, 8), HEIGHT - top))
    rows, columns = np.mgrid[:h, :w]
    angle = np.arctan2(rows - h / 2, columns - w / 2)
    radius = np.hypot((rows - h / 2) / (h / 2), (columns - w / 2) / (w / 2))
    bits = (radius <= 0.85 + 0.15 * np.sin(rng.integers(3, 8) * angle + rng.random() * 6)).astype(np.uint8)
    return (float(left), float(top), float(w), float(h)), rle.encode_part(bits, left, top, HEIGHT, WIDTH)


@functools.cache
def shapes(number: int) -> tuple[tuple[Instance, ...], list[tuple[int, Box, rle.Rle]]]:
    """Return the objects and the detections of one image, without scores."""
    rng = np.random.default_rng([7, number])
    instances, found = [], []
    for i in range(OBJECTS):
        side = float(rng.choice([24.0, 80.0, 200.0, 350.0]))
        x, y, w, h = (*rng.uniform(0, [WIDTH - side, HEIGHT - side]), *(side * rng.uniform(0.5, 1.0, 2)))
        box, mask = shape(rng, x, y, w, h)
        label = int(rng.integers(1, 11))
        instances.append(Instance(label, box, mask if i < 6 else None, is_group_of=i == 9))
        for _ in range(DETECTIONS // OBJECTS):
            near = np.array([x, y, w, h]) + rng.normal(0, 0.1 * side, 4)
            found.append((label if rng.random() < 0.8 else int(rng.integers(1, 11)), *shape(rng, *near)))
    return tuple(instances), found


def images(count: int) -> Iterator[tuple[Sample, Detections]]:
    """Yield seeded images."""
    for number in range(count):
        instances, found = shapes(number % SHAPES)
        rng = np.random.default_rng([11, number])
        scores = rng.random(len(found)).astype(np.float32)
        order = np.argsort(-scores, kind="stable").tolist()
        boxes = np.array([(x, y, x + w, y + h) for _, (x, y, w, h), _ in found], np.float32)
        sample = Sample(
            f"{number:06d}", b"", WIDTH, HEIGHT, instances, verified_present=(1, 2, 3), verified_absent=(4, 5)
        )
        labels = np.array([label for label, _, _ in found], np.int64)
        # Copies, because a network does not share masks between images.
        masks = tuple(rle.Rle(HEIGHT, WIDTH, found[i][2].counts[:1] + found[i][2].counts[1:]) for i in order)
        yield sample, Detections(boxes[order], labels[order], scores[order], masks)


def evaluate(metric: Any, count: int) -> Any:
    """Process image after image."""
    for sample, found in images(count):
        metric.process([EvaluatedImage(sample, found)])
    return metric.evaluate()


def peer(count: int, tasks: tuple[Any, ...]) -> dict[str, list[float]]:
    """Return the twelve numbers of each task by pycocotools."""
    everything = list(images(count))
    result = {}
    for task in tasks:
        truth: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for number, (sample, detections) in enumerate(everything, start=1):
            for instance in sample.instances:
                annotation = ground_truth(task, instance, HEIGHT, WIDTH)
                if annotation is not None:
                    truth.append({**annotation, "id": len(truth) + 1, "image_id": number})
            for i in range(len(detections)):
                x0, y0, x1, y1 = (float(v) for v in detections.boxes[i])
                entry: dict[str, Any] = {"image_id": number, "category_id": int(detections.labels[i])}
                entry["score"] = float(detections.scores[i])
                entry |= (
                    {"bbox": [x0, y0, x1 - x0, y1 - y0]}
                    if task == "bbox"
                    else {"segmentation": detections.masks[i].to_coco()}
                )
                found.append(entry)
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "width": WIDTH, "height": HEIGHT} for i in range(1, count + 1)],
            "categories": [{"id": category.id, "name": category.name} for category in CATEGORIES],
            "annotations": truth,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        result[task] = [float(v) for v in evaluation.stats]
    return result


def run_part(part: str, count: int) -> dict[str, Any]:
    """Measure one line of the table in this process."""
    for _ in images(SHAPES):
        pass
    before, made = memory("VmRSS"), time.process_time()
    for _ in images(count):
        pass
    made = time.process_time() - made
    started = time.process_time()
    numbers: Any = None
    with contextlib.redirect_stdout(io.StringIO()):
        if part == "coco":
            result = evaluate(CocoMetric(CATEGORIES), count)
            numbers = {task: [getattr(getattr(result, task), name) for name in SUMMARY] for task in TASKS}
        elif part == "open-images":
            numbers = evaluate(OpenImagesMetric(CATEGORIES), count).ap
        else:
            numbers = peer(count, TASKS if part == "peer" else ("segm",))
    # Without the time for generating the images.
    return {"seconds": time.process_time() - started - made, "bytes": memory("VmHWM") - before, "numbers": numbers}


def memory(name: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> int:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="images of 100 detections [5000]")
    parser.add_argument("--part", choices=PARTS.values(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(run_part(options.part, options.images)))
        return 0
    measured = {}
    for part in PARTS.values():
        command = [sys.executable, __file__, "--part", part, "--images", str(options.images)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        measured[part] = json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
    for task in TASKS:
        np.testing.assert_allclose(measured["coco"]["numbers"][task], measured["peer"]["numbers"][task], atol=1e-9)
    print(f"{options.images} images of {DETECTIONS} detections; {machine()}\n")
    print("| | processor time | of pycocotools' | memory | of pycocotools' |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for reference, own in (("peer", "coco"), ("peer-masks", "open-images")):
        for part in (reference, own):
            name = next(text for text, value in PARTS.items() if value == part)
            seconds, size = measured[part]["seconds"], measured[part]["bytes"]
            ratios = seconds / measured[reference]["seconds"], size / measured[reference]["bytes"]
            print(f"| {name} | {seconds:.1f} s | {ratios[0]:.2f} | {size / 1e6:.0f} MB | {ratios[1]:.2f} |")
    print("\nThe twelve numbers agree to 1e-9.")
    return 0


def machine() -> str:
    """Return the name of the processor and its number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, one process at a time"


if __name__ == "__main__":
    sys.exit(main())
