"""Street scenes in the layout of Open Images, to try everything without a download.

    python -m demo.scenes --out DIR --train 200 --validation 40 --test 20 --seed 0

writes `DIR/open-images-dataset` (in place of the bucket of images) and `DIR/openimages` (of the annotations).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from demo.openimages_layout import SceneConfig, SceneTruth, SplitTruth, image_id, scene_of, write_open_images
from demo.street import Scene, SceneObject, draw_scene

__all__ = [
    "Scene",
    "SceneConfig",
    "SceneObject",
    "SceneTruth",
    "SplitTruth",
    "draw_scene",
    "image_id",
    "scene_of",
    "write_open_images",
]


def main(arguments: list[str] | None = None) -> int:
    """`python -m demo.scenes`."""
    config = SceneConfig()
    parser = argparse.ArgumentParser(
        prog="python -m demo.scenes", description="Street scenes in the layout of Open Images."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--processes", type=int, default=1, help="number of processes; the files do not depend on it")
    whole, part = ("train", "validation", "test", "seed", "long_side"), ("unmasked_fraction", "group_fraction")
    for name, kind in [*((name, int) for name in whole), *((name, float) for name in part)]:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=getattr(config, name), help="(default: %(default)s)"
        )
    options = parser.parse_args(arguments)
    try:
        config = replace(config, **{name: getattr(options, name) for name in whole + part})
        truth = write_open_images(options.out, config, options.processes)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for split, found in truth.splits.items():
        boxes, masks = sum(found.boxes.values()), sum(found.masks.values())
        print(f"{split}: {len(found.sizes)} images, {boxes} boxes, {masks} masks, {found.group_boxes} group-of boxes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
