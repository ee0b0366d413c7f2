"""Time and peak memory of `inspect-shards`: the page of a million samples, and `--verify` compared with `sha256sum`.

    python benchmarks/inspecting.py [--samples 1000000]

The million samples are sparse files in which only the samples that will be read are written. Each command runs in its
own process. Prints a Markdown table. Needs Linux and 400 MB of disk on a file system with sparse files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from shards.format import rle
from shards.format.dataset import DATASET_FILE, INDEX_FILE, Category, DatasetInfo, Shard, open_dataset
from shards.format.dataset_writer import DatasetWriter
from shards.format.index_schema import INDEX_SCHEMA
from shards.format.sample import Instance, Sample, canonical_json
from shards.format.shard_tar import pack_shard, shard_path
from shards.inspect.preview_samples import choose, first_rows

PER_SHARD, SHOWN, LABEL_IMAGES = 1000, 48, 200
CLASSES = tuple(Category(n, f"class {n}", f"/m/{n}") for n in range(1, 11))
ROOT = Path(__file__).parents[1]


def main() -> int:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--samples", type=int, default=1_000_000, help="number of samples of the large dataset (default: %(default)s)"
    )
    count = parser.parse_args().samples
    print(f"{os.cpu_count()} cores\n\n| | seconds | peak memory | |\n| --- | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder, "large"), Path(folder, "small")
        nbytes = write_large(large, count)
        idle, floor = run("import pandas, shards.inspect.text_report")
        print(f"| imports | {idle:.1f} | {floor:.0f} MB | |")
        described = f"{count} samples, {nbytes / 1e9:.1f} GB"
        seconds, memory = inspect(large)
        print(f"| counts | {seconds:.1f} | {memory:.0f} MB | {described} |")
        seconds, memory = inspect(large, "--html", str(Path(folder, "page.html")))
        size = Path(folder, "page.html").stat().st_size / 1e6
        print(f"| page | {seconds:.1f} | {memory:.0f} MB | {described}; the page has {size:.1f} MB |")
        nbytes = write_small(small)
        paths = sorted(map(str, small.rglob("*.tar")))
        subprocess.run(["cat", *paths], check=True, stdout=subprocess.DEVNULL)  # both read from the page cache
        start = time.monotonic()
        subprocess.run(["sha256sum", *paths], check=True, stdout=subprocess.DEVNULL)
        hashed = time.monotonic() - start
        seconds, memory = inspect(small, "--verify")
        print(f"| sha256sum | {hashed:.1f} | | {nbytes / 1e6:.0f} MB in {len(paths)} shards |")
        print(f"| verify | {seconds:.1f} | {memory:.0f} MB | {seconds / hashed:.1f} times sha256sum |")
    return 0


def inspect(root: Path, *options: str) -> tuple[float, float]:
    """Return the seconds and peak MB of one command."""
    return run("import shards.inspect.cli; shards.inspect.cli.main(sys.argv[1:])", str(root), *options)


def run(code: str, *arguments: str) -> tuple[float, float]:
    """Run Python code in its own process and return its seconds and peak MB."""
    # getrusage would count the memory of this process, of which the other is a fork.
    measure = "\nprint(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024)"
    command = [sys.executable, "-c", f"import sys; {code}{measure}", *arguments]
    start = time.monotonic()
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    return time.monotonic() - start, float(done.stdout.split()[-1])


def make_sample(number: int, picture: bytes) -> Sample:
    """Make a sample of 1024x768 pixels with two masks and a box; all samples have the same number of bytes."""
    mask = np.zeros((768, 1024), np.uint8)
    mask[200:500, 300:700] = 1
    segmentation = rle.encode(mask)
    masked = Instance(1 + number % 9, (300.0, 200.0, 400.0, 300.0), segmentation, "b", "/m/0")
    return Sample(
        f"{number:016x}",
        picture,
        1024,
        768,
        (masked, replace(masked, box_id="c"), replace(masked, segmentation=None)),
        verified_present=(masked.category_id,),
    )


def make_picture(seed: int) -> bytes:
    """Make a JPEG of about 300 kB, a typical size in Open Images."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    small = Image.fromarray(rng.integers(0, 255, (288, 384, 3), dtype=np.uint8))
    small.resize((1024, 768), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_small(root: Path) -> int:
    """Write a dataset of 500 samples and return the bytes of its shards."""
    pictures = [make_picture(seed) for seed in range(10)]
    with DatasetWriter(root, CLASSES, samples_per_shard=100) as writer:
        for number in range(500):
            writer.add(make_sample(number, pictures[number % 10]), split="train")
    return sum(shard.nbytes for shard in open_dataset(root).info.shards)


def write_large(root: Path, count: int) -> int:
    """Write a dataset that has only the samples that will be read, and return its apparent size in bytes."""
    picture = make_picture(0)
    length = pack_shard([make_sample(0, picture)], split="train", path="").rows[0].nbytes
    numbers = np.arange(count)
    columns: dict[str, Any] = {
        "image_id": [f"{n:016x}" for n in range(count)],
        "split": ["train"] * count,
        "shard": [shard_path("train", n // PER_SHARD) for n in range(count)],
        "offset": numbers % PER_SHARD * length,
        "nbytes": np.full(count, length),
        "crc32": np.zeros(count, np.int64),
        "width": np.full(count, 1024),
        "height": np.full(count, 768),
        "classes": [[1 + n % 9] for n in range(count)],
        "instances": [[3]] * count,
        "masks": [[2]] * count,
        "groups": [[0]] * count,
    }
    shards = [
        Shard(shard_path("train", n), "train", min(PER_SHARD, count - n * PER_SHARD), PER_SHARD * length, "0" * 64)
        for n in range(-(-count // PER_SHARD))
    ]
    write_index(root, columns, shards)
    dataset = open_dataset(str(root))
    # The choice of samples depends on keys and classes only, not on the crc32 that are filled in below.
    shown = {row.row for row in choose(dataset, SHOWN)} | set(first_rows(dataset.index("train"), LABEL_IMAGES).tolist())
    for n in sorted(shown):
        data = pack_shard([make_sample(n, picture)], split="train", path="").data[:length]
        columns["crc32"][n] = zlib.crc32(data)
        path = root / shard_path("train", n // PER_SHARD)
        path.parent.mkdir(exist_ok=True)
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.seek(n % PER_SHARD * length)
            file.write(data)
    write_index(root, columns, shards)
    return count * length


def write_index(root: Path, columns: dict[str, Any], shards: list[Shard]) -> None:
    """Write index and `dataset.json` as `DatasetWriter` does, without a Python object per row."""
    root.mkdir(exist_ok=True)
    arrays = {name: pa.array(columns[name], INDEX_SCHEMA.field(name).type) for name in INDEX_SCHEMA.names}
    pq.write_table(pa.table(arrays, schema=INDEX_SCHEMA), root / INDEX_FILE, compression="zstd")
    digest = hashlib.sha256((root / INDEX_FILE).read_bytes()).hexdigest()
    info = DatasetInfo(CLASSES, tuple(shards), digest, plan="", source={})
    (root / DATASET_FILE).write_bytes(canonical_json(info.to_json()))


if __name__ == "__main__":
    sys.exit(main())
