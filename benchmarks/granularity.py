"""How long a range request should be: rate, processor time, time to the first batch, and memory, by `MAX_RANGE`.

    python benchmarks/granularity.py --json granularity.json

Raw samples (two shards of random bytes the size of photographs) from a real S3 server (SeaweedFS) on loopback, behind a
proxy that adds latency to every request; two loader processes, batches of 8. Every measurement runs in its own process;
the table has medians. Server and proxy share the machine with what is measured. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.requirements import require
from benchmarks.streaming import ROOT, group_memory, proxy
from benchmarks.streaming_loaders import LOADERS, Job, measure
from demo.s3server import S3Server
from shards.format.dataset_writer import finish_dataset
from shards.format.index_schema import IndexRow
from shards.format.sample import Category, Instance, Sample
from shards.format.shard_tar import pack_shard, shard_path
from shards.storage.location import Location
from shards.stream import read_plan

LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # MiB
LATENCIES = (0.0, 0.03, 0.1)
PER_SHARD = 1024
BYTES = 164_000  # of an image


def main() -> int:
    """Measure and print."""
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(*sys.argv[2:])), flush=True)
        os._exit(0)  # without waiting for threads and loader processes
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every single value there")
    options = parser.parse_args()
    require(["weed"])
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with S3Server() as server:
        os.environ.update(server.environment())
        server.make_bucket("granularity")
        write_samples("s3://granularity/data", options.samples)
        for latency in LATENCIES:
            with proxy(server.endpoint_url, latency) as away:
                for length in [length for _ in range(options.repeats) for length in LENGTHS]:
                    for name, value in in_fresh_process(length, options.samples, away).items():
                        values[f"{1000 * latency:.0f} ms, {length:g} MiB"][name].append(value)
    print(f"{os.cpu_count()} cores; {options.samples} samples of {BYTES / 1e6:g} MB; medians of {options.repeats}\n")
    print("| latency, longest range | samples/s | CPU, ms per sample | first batch, s | memory, MiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row, of in values.items():
        rate, cpu, first, memory = (statistics.median(of[name]) for name in ("rate", "cpu_ms", "first_s", "memory"))
        print(f"| {row} | {rate:,.0f} | {cpu:.2f} | {first:.2f} | {memory / 2**20:,.0f} |")
    if options.json:
        options.json.write_text(json.dumps(values, indent=1))
    return 0


def write_samples(root: str, count: int) -> None:
    """Write samples with random bytes in place of a picture."""
    rows: list[IndexRow] = []
    shards = []
    for number, start in enumerate(range(0, count, PER_SHARD)):
        keys = range(start, min(start + PER_SHARD, count))
        instances = (Instance(1, (1.0, 1.0, 20.0, 20.0), None),)
        samples = [Sample(f"{key:016x}", os.urandom(BYTES), 48, 32, instances) for key in keys]
        packed = pack_shard(samples, split="train", path=shard_path("train", number))
        (Location(root) / packed.shard.path).write(packed.data)
        rows.extend(packed.rows)
        shards.append(packed.shard)
    finish_dataset(Location(root), rows, shards, [Category(1, "Thing", "/m/1")])


def in_fresh_process(length: float, samples: int, environment: dict[str, str]) -> Any:
    """Run `one` in a process and a session of its own."""
    command = [sys.executable, "-m", "benchmarks.granularity", "one", str(length), str(samples)]
    variables = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, group_memory(process.pid))
            time.sleep(0.2)
        assert process.stdout is not None
        return {**json.loads(process.stdout.read().splitlines()[-1]), "memory": peak}


def one(length: str, samples: str) -> dict[str, float]:
    """Read the samples once with ranges of at most `length` MiB."""
    read_plan.MAX_RANGE = int(float(length) * 2**20)
    result = measure(Job("maskstream", "s3://granularity/data", samples=int(samples)), LOADERS["maskstream"](), 0)
    return {"rate": result.rate, "cpu_ms": result.cpu_ms, "first_s": result.first_s}


if __name__ == "__main__":
    sys.exit(main())
