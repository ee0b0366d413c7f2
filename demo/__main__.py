"""The whole workflow on one machine: `python -m demo`, or `make demo`, which installs everything first.

Draws street scenes in the Open Images layout, uploads them to an S3 server on loopback, and runs the project's commands
on them exactly as a user would: build-shards, inspect-shards, accelerate launch trainer/train.py with two CPU
processes, trainer/predict.py.
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
        _announce(f"An S3 server answers at {server.endpoint_url}")
        _upload_scenes(server, out / "scenes", arguments.train, arguments.seed)
        server.make_bucket("demo-shards")
        _run(
            "build-shards --per-class 1000 --eval-per-class 100 --images-per-shard 64 "
            f"--images s3://open-images-dataset --annotations s3://openimages --out {shards}",
            environment,
        )
        page = out / "dataset.html"
        _run(f"inspect-shards {shards} --html {shlex.quote(str(page))}", environment)
        _run(
            "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
            f"trainer/train.py --config configs/demo.yaml --data.shards {shards} --run.dir {shlex.quote(str(run_dir))} "
            f"--train.seed {arguments.seed}",
            # accelerate starts several processes only with --multi_gpu; this makes them CPU processes.
            environment | {"ACCELERATE_USE_CPU": "true"},
        )
        # The test split was used neither for training nor for tuning.
        pictures = sorted((out / "scenes" / "open-images-dataset" / "test").glob("*.jpg"))[:12]
        _run(
            f"python trainer/predict.py --checkpoint {shlex.quote(str(run_dir))} --out {shlex.quote(str(predictions))}",
            environment,
            more=[f"s3://open-images-dataset/test/{picture.name}" for picture in pictures],
        )
    _summary(run_dir, predictions, page, time.monotonic() - start)
    return 0


def _upload_scenes(server: S3Server, folder: Path, train: int, seed: int) -> None:
    write_open_images(folder, SceneConfig(train=train, validation=48, test=16, seed=seed))
    for bucket in ("open-images-dataset", "openimages"):
        server.make_bucket(bucket)
        server.upload(folder / bucket, bucket)
    _announce(f"Drew {train} + 48 + 16 street scenes and uploaded them in the layout of Open Images")


def _run(command: str, environment: dict[str, str], more: Sequence[str] = ()) -> None:
    """Run a command of this environment with `more` arguments; a failure ends the demo."""
    _announce(f"$ {command}" + (f" {more[0]} ..." if more else ""))
    name, *words = shlex.split(command)
    program = sys.executable if name == "python" else str(SCRIPTS / name)
    status = subprocess.run([program, *words, *more], cwd=REPOSITORY, env=environment, check=False).returncode
    if status:
        sys.exit(f"demo: error: {name} ended with status {status}: its message is above")


def _summary(run_dir: Path, predictions: Path, page: Path, seconds: float) -> None:
    last = json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[-1])
    _announce(f"The demo took {seconds:.0f} s")
    print(f"mask AP at IoU 0.5 on held-out scenes: {last['segm']['ap50']:.3f} (boxes: {last['bbox']['ap50']:.3f})")
    print(f"the dataset, as a page:    {page}")
    print(f"pictures worth looking at: {predictions}")
    print(f"the run and its curves:    {run_dir / 'curves.png'}")


def _announce(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
