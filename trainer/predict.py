"""Find objects in images: pictures of what was found, and COCO JSON.

    python trainer/predict.py --checkpoint runs/traffic --out predictions street.jpg https://example.org/crossing.jpg

Images are local paths or any fsspec URLs. --out receives a picture an image, and predictions.json: a COCO dataset
("images", "categories", "annotations") whose annotations carry a score. Coordinates are those of the pixels as stored:
EXIF orientation is ignored, as it is in training.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import posixpath
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from shards.errors import UserError
from shards.storage import Location
from trainer import command

log = logging.getLogger("trainer.predict")

JPEG_QUALITY = 92


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 1 when an image could not be read, and the others were done."""
    return command.run("predict", lambda: predict(parse(arguments)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: a wrong argument.
    """
    parser = command.Parser(prog="predict.py", description="Find objects in images.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="path or URL of an image")
    parser.add_argument("--checkpoint", required=True, metavar="URL", help="a run's folder, or one checkpoint's")
    parser.add_argument("--out", required=True, metavar="URL", help="folder for the pictures and predictions.json")
    parser.add_argument("--score", type=float, default=0.5, metavar="S", help="lowest score that counts, 0 to 1 [0.5]")
    parser.add_argument("--device", metavar="NAME", help="such as cuda or cpu [a GPU if there is one]")
    parsed: argparse.Namespace = parser.parse_args(arguments)
    if not 0 <= parsed.score <= 1:
        raise UserError(f"--score is {parsed.score}: it must be between 0 and 1")
    return parsed


def predict(options: argparse.Namespace) -> int:
    """Do every image that can be read; 1 if one could not.

    Raises:
        UserError: the checkpoint cannot be had, or --out cannot be written.
    """
    command.start_logging()
    import torch
    from PIL import Image

    from shards.draw import draw_instances, legible_scale
    from trainer.checkpoint import open_checkpoint
    from trainer.data import decode_image
    from trainer.detect import detect
    from trainer.model import rebuild

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    state, out = open_checkpoint(options.checkpoint), Location(options.out)
    network = rebuild(state)
    # Whatever threshold the run was evaluated with: --score decides here.
    network.roi_heads.score_thresh = options.score
    try:
        network.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise UserError(f"--device {device}: it cannot be used ({str(error).splitlines()[0]})") from error

    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    failures = 0
    for image, name in zip(options.images, picture_names(options.images, options.out), strict=True):
        try:
            pixels = decode_image(Location(image).read())
        except UserError as error:
            print(f"predict: {image}: {error}", file=sys.stderr, flush=True)
            failures += 1
            continue
        found = detect(network, [pixels], device)[0]
        height, width = pixels.shape[-2:]
        entry = {"id": len(entries) + 1, "file_name": image, "width": width, "height": height, "picture": name}
        entries.append(entry)
        for instance, score in zip(found.instances(), found.scores, strict=True):
            annotations.append(annotation(len(annotations) + 1, entry["id"], instance, float(score)))
        picture = draw_instances(
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()),
            found.instances(),
            state.categories,
            scores=found.scores.tolist(),
            scale=legible_scale(width, height),
        )
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)  # thin coloured lines stay sharp
        (out / name).write(buffer.getvalue())
        print(f"{out / name}: {len(found)} objects", flush=True)
    categories = [{"id": c.id, "name": c.name, "mid": c.mid} for c in state.categories]
    value = {"images": entries, "categories": categories, "annotations": annotations}
    (out / "predictions.json").write(json.dumps(value, separators=(",", ":")).encode("utf-8"))
    print(f"{out / 'predictions.json'}: {len(annotations)} objects in {len(entries)} images", flush=True)
    return 1 if failures else 0


def annotation(number: int, image: int, instance: Any, score: float) -> dict[str, Any]:
    """A detection as a COCO annotation with a score, which is also COCO's form of a result."""
    from shards import rle

    return {
        "id": number,
        "image_id": image,
        "category_id": instance.category_id,
        "bbox": [round(value, 2) for value in instance.bbox],
        "score": round(score, 5),
        "segmentation": instance.segmentation.to_json(),
        "area": rle.area(instance.segmentation),
        "iscrowd": 0,
    }


def picture_names(images: Sequence[str], out: str) -> list[str]:
    """A file name in `out` for each image's picture: its own name with .jpg, numbered where two would meet.

    No picture takes the place of an image that is asked for, even when images lie in `out`.
    """
    taken = {_key(image) for image in images}
    names = []
    for image in images:
        path = urlsplit(image).path if "://" in image else image
        stem = posixpath.splitext(posixpath.basename(unquote(path) if "://" in image else path))[0] or "image"
        name, number = f"{stem}.jpg", 1
        while _key(f"{out.rstrip('/')}/{name}") in taken:
            number += 1
            name = f"{stem}-{number}.jpg"
        taken.add(_key(f"{out.rstrip('/')}/{name}"))
        names.append(name)
    return names


def _key(url: str) -> str:
    """Equal for equal places, also where letters of both cases are one file."""
    if "://" in url and not url.startswith("file://"):
        return url.casefold()
    import os

    return os.path.realpath(url.removeprefix("file://")).casefold()


if __name__ == "__main__":
    sys.exit(main())
