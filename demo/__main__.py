"""The whole workflow on one machine: `python -m demo`, or `make demo`, which installs everything first.

Draws street scenes in the Open Images layout, uploads them to an S3 server on loopback, and runs the project's commands
on them exactly as a user would: build-shards, inspect-shards, accelerate launch trainer/train.py with two CPU
processes, trainer/evaluate.py, trainer/predict.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from demo.openimages_layout import write_open_images
from demo.s3server import S3Server
from demo.scenes import SceneConfig

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
REAL = """\
build-shards --per-class 20 --dry-run
build-shards --per-class 20 --out shards-small
inspect-shards shards-small --html look.html
maskstream train --config traffic-heads-first --data.shards shards-small --data.batch_size 2 --run.dir runs/first
maskstream evaluate --checkpoint runs/first --data.shards shards-small --data.split val
maskstream predict --checkpoint runs/first --out predictions street.jpg"""


def main() -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument(
        "--out", default="demo-out", help="folder for the run and its pictures, emptied first [demo-out]"
    )
    parser.add_argument("--train", type=int, default=360, help="training scenes [360]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes and the training [0]")
    arguments = parser.parse_args()
    out = Path(arguments.out).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    start = time.monotonic()
    shards, run_dir, predictions = "s3://demo-shards/traffic", out / "run", out / "predictions"
    with S3Server() as server:
        environment = {**os.environ, **server.environment(), "OMP_NUM_THREADS": "1"}
        _stage(1, f"Draw {arguments.train + 64} street scenes, and serve them as Open Images is served", "10 s")
        _upload_scenes(server, out / "scenes", arguments.train, arguments.seed)
        server.make_bucket("demo-shards")
        _stage(2, "Select images and masks of the classes, and pack them into shards in a bucket", "10 s")
        _run(
            "build-shards --per-class 1000 --eval-per-class 100 --images-per-shard 64 --no-cache "
            f"--images s3://open-images-dataset --annotations s3://openimages --out {shards}",
            environment,
        )
        _stage(3, "Look at the dataset: counts, and a page with masks and boxes", "5 s")
        page = out / "dataset.html"
        _run(f"inspect-shards {shards} --html {shlex.quote(str(page))}", environment)
        _stage(4, "Train Mask R-CNN from random weights, streaming, with two processes", "3 to 6 minutes")
        _run(
            "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
            f"trainer/train.py --config configs/demo.yaml --data.shards {shards} --run.dir {shlex.quote(str(run_dir))} "
            f"--train.seed {arguments.seed}",
            # accelerate starts several processes only with --multi_gpu; this makes them CPU processes.
            environment | {"ACCELERATE_USE_CPU": "true"},
        )
        checkpoint = f"--checkpoint {shlex.quote(str(run_dir / 'best'))}"
        _stage(5, "Evaluate the best weights on the test split, which no step of training has used", "10 s")
        evaluation = out / "evaluation"
        _run(
            f"python trainer/evaluate.py {checkpoint} --data.shards {shards} --data.split test "
            f"--out {shlex.quote(str(evaluation))}",
            environment | {"ACCELERATE_USE_CPU": "true"},
        )
        _stage(6, "Find objects in pictures of the test split", "10 s")
        pictures = sorted((out / "scenes" / "open-images-dataset" / "test").glob("*.jpg"))[:12]
        _run(
            f"python trainer/predict.py {checkpoint} --out {shlex.quote(str(predictions))}",
            environment,
            more=[f"s3://open-images-dataset/test/{picture.name}" for picture in pictures],
        )
    _summary(out, time.monotonic() - start)
    return 0


def _upload_scenes(server: S3Server, folder: Path, train: int, seed: int) -> None:
    write_open_images(folder, SceneConfig(train=train, validation=48, test=16, seed=seed))
    for bucket in ("open-images-dataset", "openimages"):
        server.make_bucket(bucket)
        server.upload(folder / bucket, bucket)
    print(f"{train} scenes for training, 48 for validation and 16 for the test are at {server.endpoint_url}")


def _run(command: str, environment: dict[str, str], more: Sequence[str] = ()) -> None:
    """Run a command of this environment with `more` arguments; a failure ends the demo."""
    print(f"$ {command}" + (f" {more[0]} ..." if more else ""), flush=True)
    name, *words = shlex.split(command)
    program = sys.executable if name == "python" else str(SCRIPTS / name)
    status = subprocess.run([program, *words, *more], cwd=REPOSITORY, env=environment, check=False).returncode
    if status:
        sys.exit(f"demo: error: {name} ended with status {status}: its message is above")


def _summary(out: Path, seconds: float) -> None:
    scores = json.loads((out / "evaluation" / "evaluation.json").read_text())
    _announce(f"The demo took {seconds / 60:.0f} minutes. On the test split, at IoU 0.5:")
    print(f"mask AP {100 * scores['segm']['ap50']:.1f} %, box AP {100 * scores['bbox']['ap50']:.1f} %")
    _announce("Worth looking at")
    for what, name in (
        ("the dataset", "dataset.html"),
        ("pictures with the objects found", "predictions"),
        ("worst and best images of the evaluation", "evaluation/images.html"),
        ("losses, AP and speed of the run", "run/curves.png"),
        ("the first training images as the network sees them", "run/batches.jpg"),
    ):
        print(f"{what:<51} {out / name}")
    _announce("The same with photographs of Open Images (docs/getting-started.md)")
    print(REAL)


def _stage(number: int, purpose: str, duration: str) -> None:
    _announce(f"{number} of 6  {purpose} (about {duration} on two cores)")


def _announce(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
