"""Processor time of one small read, compared with s3fs, threads, and webdataset's tar reader, in one run.

    python benchmarks/reads.py

A real S3 server (SeaweedFS) on loopback without added latency; the time is that of all threads of this process, without
the server. Files are in the page cache; both sides check a sample's crc32. Prints a Markdown table.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from webdataset.tariterators import tar_file_iterator

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.requirements import require
from demo.s3server import S3Server
from shards.format.sample import Sample
from shards.format.shard_tar import pack_shard, parse_members
from shards.storage.local_files import expect, read_file
from shards.storage.location import Location
from shards.storage.reads import Read, read_many

COUNT, RANGE, WHOLE = 1000, 2000, 164_000


def main() -> int:
    """Measure and print."""
    require(["weed"])
    with S3Server() as server:
        os.environ.update(server.environment())
        server.make_bucket("reads")
        (Location("s3://reads") / "zip").write(os.urandom(RANGE * COUNT))
        (Location("s3://reads") / "jpg").write(os.urandom(WHOLE))
        print(f"{COUNT} reads, 32 in flight, {os.cpu_count()} cores; ms of processor time per read\n")
        print("| | other | maskstream | ratio |")
        print("| --- | ---: | ---: | ---: |")
        starts = [n * RANGE for n in range(COUNT)]
        ends = [start + RANGE for start in starts]
        for anonymous in (False, True):
            part, whole = (Location(f"s3://reads/{name}", anonymous) for name in ("zip", "jpg"))
            kind = "unsigned" if anonymous else "signed"
            row(
                f"S3, ranges of {RANGE} bytes, {kind}, by s3fs",
                partial(part.fs.cat_ranges, [part.path] * COUNT, starts, ends, batch_size=32),
                partial(read_many, [Read(part, s, e) for s, e in zip(starts, ends, strict=True)]),
            )
            row(
                f"S3, objects of {WHOLE} bytes, {kind}, by s3fs",
                partial(whole.fs.cat_ranges, [whole.path] * COUNT, None, None, batch_size=32),
                partial(read_many, [Read(whole)] * COUNT),
            )
    with tempfile.NamedTemporaryFile() as file:
        samples = [sample_tar() for _ in range(COUNT // 10)]
        file.write(b"".join(samples))
        file.flush()
        places = [(number * len(samples[0]), (number + 1) * len(samples[0])) for number in range(len(samples))] * 10
        row(
            f"files, samples of {WHOLE} bytes, by 8 threads, 64 ahead",
            lambda: in_threads(file.name, places),
            lambda: as_needed(file.name, places),
        )
    data = memoryview(samples[0])
    row(
        f"the members of a sample of {WHOLE} bytes, by webdataset",
        lambda: [list(tar_file_iterator(io.BytesIO(data))) for _ in range(COUNT)],
        lambda: [parse_members(data, f"{0:016x}", where="") for _ in range(COUNT)],
    )
    return 0


def sample_tar() -> bytes:
    """Return a shard of one sample of random bytes."""
    return pack_shard([Sample(f"{0:016x}", os.urandom(WHOLE), 640, 480)], split="train", path="t").data


def in_threads(path: str, places: list[tuple[int, int]]) -> None:
    """Read in threads, and hold samples in memory until they are needed."""
    with ThreadPoolExecutor(8) as pool:
        ahead = [pool.submit(read_file, path, *place) for place in places[:64]]
        for place in places[64:] + [(0, 0)] * 64:
            zlib.crc32(ahead.pop(0).result())
            ahead.append(pool.submit(read_file, path, *place))


def as_needed(path: str, places: list[tuple[int, int]]) -> None:
    """Read each sample when it is needed, and advise the kernel 64 samples before."""
    for now, later in zip(places, places[64:] + [(0, 0)] * 64, strict=True):
        expect(path, *later)
        zlib.crc32(read_file(path, *now))


def row(name: str, other: Callable[[], object], own: Callable[[], object]) -> None:
    """Time both, each once to warm up and once to measure."""
    times = []
    for function in (other, own):
        function()
        start = time.process_time()
        function()
        times.append(1000 * (time.process_time() - start) / COUNT)
    print(f"| {name} | {times[0]:.3f} | {times[1]:.3f} | {times[0] / times[1]:.1f} |")


if __name__ == "__main__":
    sys.exit(main())
