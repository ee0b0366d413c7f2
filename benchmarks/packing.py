"""Processor time of each step from an image and its masks to a sample, in one process, from memory.

    python benchmarks/packing.py --images 300

For comparison, the time that Pillow takes to decode the same JPEGs and masks in full and to resize the masks. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bucket import Bucket, make_bucket
from benchmarks.building import machine
from builder.packing.images import check_image, encode_mask
from shards.format.rle import Rle
from shards.format.sample import Instance, Sample
from shards.format.shard_tar import pack_shard

Picture = tuple[str, bytes, list[bytes]]  # ImageID, JPEG, mask PNGs


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--long-side", type=int, help="longer side of the images in pixels; Open Images has 1024")
    options = parser.parse_args()
    with make_bucket(options.images, long_side=options.long_side) as bucket:
        pictures = read(bucket)
    samples = [sample_of(picture) for picture in pictures]
    rows = {
        "JPEG: every coefficient decoded": lambda: [check_image(jpeg) for _, jpeg, _ in pictures],
        "masks: decoded, resized, encoded": lambda: [sample_of(picture) for picture in pictures],
        "masks: the same, all left to Pillow": lambda: with_pillow(pictures),
        "MD5 of the JPEG": lambda: [hashlib.md5(jpeg, usedforsecurity=False).digest() for _, jpeg, _ in pictures],
        "JSON, tar, crc32, sha256": lambda: pack_shard(samples, split="train", path="train/000000.tar"),
        "Pillow: JPEG in full": lambda: list(map(decode, pictures)),
        "Pillow: masks in full, resized": lambda: list(map(resize, pictures)),
    }
    masks = sum(len(masks) for _, _, masks in pictures)
    print(f"{len(pictures)} images ({bucket.what}), {masks} masks; {machine()}\n")
    print("| step | ms per image |\n| --- | ---: |")
    for name, work in rows.items():
        print(f"| {name} | {1000 * seconds(work) / len(pictures):.2f} |")
    return 0


def read(bucket: Bucket) -> list[Picture]:
    """Return the JPEGs and their masks of the chosen classes."""
    masks: dict[str, list[bytes]] = {image_id: [] for image_id in bucket.image_ids}
    archives: dict[str, zipfile.ZipFile] = {}
    for name, member in bucket.masks:
        archive = archives.setdefault(name, zipfile.ZipFile(bucket.annotations / "v5/train-masks" / name))
        masks[member[:16]].append(archive.read(member))
    return [(name, (bucket.images / f"train/{name}.jpg").read_bytes(), found) for name, found in masks.items()]


def sample_of(picture: Picture) -> Sample:
    """Return a sample with the masks of a picture."""
    name, jpeg, masks = picture
    width, height = Image.open(io.BytesIO(jpeg)).size
    encoded = [encode_mask(mask, width, height) for mask in masks]
    instances = tuple(Instance(1, (0.0, 0.0, 1.0, 1.0), mask) for mask in encoded if isinstance(mask, Rle))
    return Sample(name, jpeg, width, height, instances)


def with_pillow(pictures: list[Picture]) -> None:
    """Encode the masks without `builder.packing.bit_png`."""
    with mock.patch("builder.packing.images.read_bits", return_value=None):
        for picture in pictures:
            sample_of(picture)


def decode(picture: Picture) -> None:
    """Decode a JPEG in full with Pillow."""
    Image.open(io.BytesIO(picture[1])).load()


def resize(picture: Picture) -> None:
    """Decode the masks in full and resize them to the image with Pillow."""
    size = Image.open(io.BytesIO(picture[1])).size
    for mask in picture[2]:
        Image.open(io.BytesIO(mask)).resize(size, Image.Resampling.NEAREST)


def seconds(work: Callable[[], object]) -> float:
    """Return the shortest processor time of three runs."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


if __name__ == "__main__":
    sys.exit(main())
