"""Long runs of the stream: correctness under faults, and memory.

    python benchmarks/soak.py faults                      # five epochs of 5000 samples from S3 with frequent faults
    python benchmarks/soak.py memory                      # memory of loader processes over 200 000 samples
    python benchmarks/soak.py memory --s3                 # the same from S3, which is read by another thread
    python benchmarks/soak.py memory --dataset 1000000    # the same with a million: 2.5 GB in the temporary folder

`faults`: a real S3 server (SeaweedFS) behind a proxy that breaks a share of the requests; every sample is compared with
that of a stream from a local disk. `memory`: the private memory (USS) of each loader process while it streams. The
pictures are random bytes, which nothing decodes. Prints Markdown tables; exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.requirements import require
from demo.s3proxy import Fault, Kind, S3Proxy
from demo.s3server import S3Server
from shards.format.dataset import Category, Dataset, Shard, open_dataset
from shards.format.dataset_writer import finish_dataset
from shards.format.index_schema import IndexRow
from shards.format.sample import Instance, Sample
from shards.format.shard_tar import pack_shard, shard_path
from shards.storage.location import Location
from shards.stream.loader import LoaderStatistics, loader
from shards.stream.streams import ShardStream

FAULTS: tuple[Kind, ...] = ("reset", "slow_down", "internal_error", "truncate", "corrupt", "stall")
BATCH = 8


def write_samples(root: Location, count: int, *, nbytes: int = 1500, per_shard: int = 500) -> Dataset:
    """Write a dataset of `count` samples whose pictures are up to twice `nbytes` random bytes."""
    rows: list[IndexRow] = []
    shards: list[Shard] = []
    for number, first in enumerate(range(0, count, per_shard)):
        samples = [_sample(n, nbytes) for n in range(first, min(first + per_shard, count))]
        packed = pack_shard(samples, split="train", path=shard_path("train", number))
        (root / packed.shard.path).write(packed.data)
        rows.extend(packed.rows)
        shards.append(packed.shard)
    finish_dataset(root, rows, shards, (Category(1, "Person", "/m/01g317"),))
    return open_dataset(root)


def _sample(number: int, nbytes: int) -> Sample:
    numbers = random.Random(number)
    picture = numbers.randbytes(numbers.randrange(1, 2 * nbytes))
    return Sample(f"{number:016x}", picture, 64, 48, (Instance(1, (1.0, 2.0, 30.0, 40.0), None),))


@dataclass(frozen=True)
class Soak:
    """The result of several epochs with faults.

    Attributes:
        wrong: batches that differ from those of the stream without faults.
        most, least: how often a sample was visited in an epoch.
        faults: injected faults by kind.
        statistics: of the loader.
    """

    wrong: int
    most: int
    least: int
    faults: dict[str, int]
    statistics: LoaderStatistics


def soak(endpoint: str, remote: str, local: Dataset, *, epochs: int, workers: int, seed: int, share: float) -> Soak:
    """Stream a dataset through a proxy that breaks a share of the requests, and compare with its local copy.

    Args:
        endpoint: of the S3 server that has the dataset at `remote`; the AWS_ variables are changed meanwhile.
        remote: URL of the dataset.
        local: its local copy.
        epochs: number of epochs.
        workers: loader processes.
        seed: of the order.
        share: of the requests that each kind of fault hits, above 0 to 1; a fifth of it for stalls.
    """

    def stream(dataset: Dataset) -> ShardStream[list[Sample]]:
        return ShardStream(dataset, "train", batch_size=BATCH, seed=seed, lanes=4, window=32, read_ahead=2**18)

    seen: list[dict[str, int]] = [{} for _ in range(epochs)]
    faults = [Fault(kind, "GET", "train/", every=round((5 if kind == "stall" else 1) / share)) for kind in FAULTS]
    dataset = open_dataset(remote)
    wrong = 0
    with S3Proxy(endpoint, faults) as proxy, mock.patch.dict(os.environ, proxy.environment()):
        with (
            mock.patch("shards.storage.location._instances", {}),
            mock.patch("shards.storage.object_store._settings", {}),
            mock.patch("shards.storage.location.READ_TIMEOUT_S", 2.0),
            mock.patch("shards.common.back_off.SCALE", 0.1),
        ):
            batches, reference = loader(stream(dataset), workers=workers), stream(local)
            count = epochs * reference.batches_per_epoch
            for number, (batch, expected) in enumerate(zip(islice(batches, count), reference)):
                wrong += batch != expected
                for sample in batch:
                    epoch = seen[number // reference.batches_per_epoch]
                    epoch[sample.image_id] = epoch.get(sample.image_id, 0) + 1
    most = max(max(epoch.values()) for epoch in seen)
    least = 1 if all(len(epoch) >= reference.batches_per_epoch * BATCH for epoch in seen) else 0
    return Soak(wrong, most, least, dict(proxy.counters.faults), batches.statistics)


def memory(dataset: Dataset, *, samples: int, workers: int, readings: int = 40) -> Iterator[list[float]]:
    """Stream a number of samples, and yield the USS of each loader process in MB (10^6 bytes) at regular intervals."""
    before = multiprocessing.active_children()
    batches = loader(ShardStream(dataset, "train", batch_size=BATCH, seed=1, read_ahead=8 * 2**20), workers=workers)
    every = max(1, samples // BATCH // readings)
    for number, _ in enumerate(islice(batches, samples // BATCH), start=1):
        if number % every == 0:
            yield [private_mb(child.pid) for child in multiprocessing.active_children() if child not in before]


def private_mb(process: int | None) -> float:
    """Return the memory that a process shares with no other (USS), in MB (10^6 bytes); only on Linux."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    return sum(int(kib) for kib in re.findall(r"^Private_\w+: +(\d+) kB$", text, re.MULTILINE)) * 1024 / 1e6


def quarters(readings: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the largest process's mean in the first quarter, after a warm-up of a tenth, and in the last quarter."""
    largest = [max(reading) for reading in readings]
    warm, quarter = len(largest) // 10, len(largest) // 4
    first, last = largest[warm : warm + quarter], largest[-quarter:]
    return sum(first) / len(first), sum(last) / len(last)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["faults", "memory"])
    parser.add_argument("--dataset", type=int, help="samples in the dataset (default: 5000, memory: 2000)")
    parser.add_argument("--epochs", type=int, default=5, help="faults: number of epochs (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=200_000, help="memory: samples to stream (default: %(default)s)")
    parser.add_argument("--s3", action="store_true", help="memory: from an S3 server (default: from the local disk)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="faults: seed of the order (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.05, help="faults: share of requests (default: %(default)s)")
    parser.add_argument("--growth", type=float, default=5.0, help="memory: allowed MB (default: %(default)s)")
    options = parser.parse_args(arguments)
    require(["weed"] if options.s3 or options.what == "faults" else [])
    with tempfile.TemporaryDirectory() as folder:
        count = options.dataset or (5000 if options.what == "faults" else 2000)
        local = write_samples(Location(folder), count)
        if options.what == "faults":
            return report_soak(local, options)
        if not options.s3:
            return report_memory(local, options)
        with S3Server() as server:
            os.environ.update(server.environment())
            server.make_bucket("soak")
            server.upload(local.root.path, "soak")
            return report_memory(open_dataset("s3://soak"), options)


def report_soak(local: Dataset, options: argparse.Namespace) -> int:
    with S3Server() as server:
        os.environ.update(server.environment())
        server.make_bucket("soak")
        server.upload(local.root.path, "soak")
        began = time.perf_counter()
        result = soak(
            server.endpoint_url,
            "s3://soak",
            local,
            epochs=options.epochs,
            workers=options.workers,
            seed=options.seed,
            share=options.share,
        )
        seconds = time.perf_counter() - began
    done = result.statistics
    holds = result.wrong == 0 and result.most == result.least == 1
    print(f"{options.epochs} epochs, {options.workers} loader processes, seed {options.seed}, {seconds:.0f} s\n")
    print("| samples | requests | retries | " + " | ".join(FAULTS) + " | wrong batches | visits per sample and epoch |")
    print("| ---: " * (len(FAULTS) + 5) + "|")
    kinds = " | ".join(str(result.faults.get(kind, 0)) for kind in FAULTS)
    often = f"{result.least} to {result.most}"
    print(f"| {done.samples} | {done.requests} | {done.retries} | {kinds} | {result.wrong} | {often} |")
    return 0 if holds else 1


def report_memory(dataset: Dataset, options: argparse.Namespace) -> int:
    began = time.perf_counter()
    readings = list(memory(dataset, samples=options.samples, workers=options.workers))
    seconds = time.perf_counter() - began
    first, last = quarters(readings)
    source = "S3" if options.s3 else "the local disk"
    print(f"{options.workers} loader processes, from {source}, {seconds:.0f} s; USS in MB of the largest\n")
    print("| samples in the dataset | samples streamed | first quarter | last quarter | growth |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    split = len(dataset.index("train"))
    print(f"| {split} | {options.samples} | {first:.1f} | {last:.1f} | {last - first:+.1f} |")
    return 0 if last - first <= options.growth else 1


if __name__ == "__main__":
    sys.exit(main())
