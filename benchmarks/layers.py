"""How much of the network is worth training, on drawn scenes: both comparisons of configs/.

    python benchmarks/layers.py --out layers-out             # some ten minutes
    python benchmarks/layers.py --out layers-out --scenes 30 --steps 1

A network with the demo's widths and a ResNet-34 learns Person and Car on scenes of one seed, from scratch.
`trainer/compare.py` then trains it on scenes of another seed with two classes more (Traffic light, Traffic sign), once
for each setting of configs/compare-layers.yaml and configs/compare-heads-all.yaml: the same initial weights, the same
batches, 30 short epochs each. All in one process with one thread, from local disk. The same command resumes a run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from demo.openimages_layout import SceneConfig, write_open_images  # noqa: E402

BASE = ROOT / "configs" / "demo.yaml"
LAUNCH = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
COMPARISONS = ("compare-layers", "compare-heads-all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="layers-out", help="folder for all of it [layers-out]")
    parser.add_argument("--scenes", type=int, default=160, help="training scenes of each dataset [160]")
    parser.add_argument("--steps", type=int, default=2, help="steps of each of the 30 epochs, of 4 images [2]")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    known = build(out / "known", 1, options.scenes, ["--classes", "Person", "Car"])
    new = build(out / "new", 2, options.scenes, [])
    common = "--model.backbone resnet34 --data.workers 0 --run.log_steps 30 --optim.milestones [] --run.trackers []"
    common += " --data.min_size 96 --data.max_size 128 --run.pictures 0"
    common += f" --train.steps_per_epoch {options.steps} --train.checkpoint_steps 10000 --train.keep_checkpoints 1"
    words = ["--config", BASE, *common.split()]
    # Twice as long as what follows.
    longer = ["--train.epochs", "60", "--train.eval_epochs", "60", "--optim.schedule", "cosine"]
    run("trainer/train.py", *words, *longer, "--data.shards", known, "--run.dir", out / "pretrained")
    words += ["--train.epochs", "30", "--train.eval_epochs", "15", "--model.weights", out / "pretrained"]
    for name in COMPARISONS:
        places = ["--data.shards", new, "--run.dir", out / name, "--launch", LAUNCH]
        run("trainer/compare.py", ROOT / "configs" / f"{name}.yaml", *words, *places)
    for name in COMPARISONS:
        print(f"\n{name}\n\n{(out / name / 'compare.md').read_text()}")


def build(folder: Path, seed: int, scenes: int, more: list[str]) -> Path:
    """Shards of drawn scenes; those that are there already stay."""
    shards = folder / "shards"
    if not (shards / "dataset.json").exists():
        write_open_images(folder / "scenes", SceneConfig(train=scenes, validation=48, test=0, seed=seed))
        places = ["--images", folder / "scenes/open-images-dataset", "--annotations", folder / "scenes/openimages"]
        run(
            "-m",
            "builder.commands.cli",
            "--per-class",
            "1000",
            "--eval-per-class",
            "100",
            *more,
            *places,
            "--out",
            shards,
        )
    return shards


def run(*words: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
