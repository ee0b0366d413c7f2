"""The cost of a dataset's size: opening it, the memory of loader processes, round trips to the first batch.

    python benchmarks/opening.py

Measures an index of two thousand and one of a million samples (without shards, which are not read) from local disk;
then two thousand small samples in a real S3 server (SeaweedFS) behind a proxy that adds latency: the slope of the time
over the latency is the number of sequential round trips to the first batch of a fresh process. Prints Markdown.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.requirements import require
from demo.s3proxy import S3Proxy
from demo.s3server import S3Server
from shards.format.dataset import DATASET_FILE, INDEX_FILE, Category, DatasetInfo, Shard
from shards.format.dataset import open_dataset as open_at
from shards.format.dataset_writer import finish_dataset
from shards.format.index_schema import INDEX_SCHEMA, IndexRow
from shards.format.sample import Instance, Sample, canonical_json
from shards.format.shard_tar import pack_shard, shard_path
from shards.storage.location import Location
from shards.stream.streams import ShardStream

COUNTS = (2_000, 1_000_000)
PER_SHARD = 1500
CLASSES = 20
WORKERS = 4
BATCHES = 4000  # per worker, half of them before the end of an epoch
LATENCIES = (0.0, 0.5, 1.0)


class Walk(IterableDataset):
    """Does everything that a loader process does with the index, except for reading; yields its memory by kind."""

    def __init__(self, stream: ShardStream[Any]) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, int]]:
        order = self.stream.order
        first = max(order.batches_per_epoch - BATCHES // 2, 0)
        for position in range(first, first + BATCHES):
            rows = order.rows(position, 0)
            index = order.indexes[0]
            _ = index.shard[rows], index.offset[rows], index.nbytes[rows], index.crc32[rows], index.image_id(rows[0])
        yield memory()


def memory() -> dict[str, int]:
    """Return the memory of this process by kind in bytes, from Linux' /proc/self/smaps_rollup."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def write_index(root: Path, count: int) -> None:
    """Write a dataset of random samples of 100 to 500 kB, without its shards."""
    rng = np.random.default_rng(0)
    nbytes = rng.integers(100_000, 500_000, count)
    number = np.arange(count) // PER_SHARD
    before = np.cumsum(nbytes) - nbytes
    lengths = rng.integers(1, 5, count)
    lists = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    pairs = int(lengths.sum())
    classes = np.sort(rng.integers(1, CLASSES // 4, (count, 4)) + np.arange(4) * CLASSES // 4, axis=1)
    flat = {
        "classes": classes[np.arange(4) < lengths[:, None]],
        "instances": rng.integers(1, 9, pairs),
        "masks": rng.integers(0, 3, pairs),
        "groups": np.zeros(pairs),
    }
    columns = {
        "image_id": [f"{key:016x}" for key in rng.integers(0, 2**62, count)],
        "split": ["train"] * count,
        "shard": [shard_path("train", n) for n in number.tolist()],
        "offset": before - before[number * PER_SHARD],
        "nbytes": nbytes,
        "crc32": rng.integers(0, 2**32, count),
        "width": np.full(count, 1024),
        "height": np.full(count, 768),
        **{name: pa.ListArray.from_arrays(lists, pa.array(values, pa.int32())) for name, values in flat.items()},
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), buffer, compression="zstd")
    sizes = np.bincount(number, weights=nbytes).astype(int)
    shards = tuple(
        Shard(shard_path("train", n), "train", samples, int(size), "0" * 64)
        for n, (samples, size) in enumerate(zip(np.bincount(number).tolist(), sizes))
    )
    categories = tuple(Category(n, f"class {n}", f"/m/{n}") for n in range(1, CLASSES + 1))
    info = DatasetInfo(categories, shards, hashlib.sha256(buffer.getvalue()).hexdigest())
    (Location(str(root)) / INDEX_FILE).write(buffer.getvalue())
    (Location(str(root)) / DATASET_FILE).write(canonical_json(info.to_json()))


def measure_index(root: str) -> dict[str, Any]:
    """Return seconds and bytes of one index; run it in a fresh process."""
    found: dict[str, Any] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        began, busy = time.perf_counter(), time.process_time()
        result = function()
        found[name], found[f"{name}, processor time"] = time.perf_counter() - began, time.process_time() - busy
        return result

    dataset = timed("open_dataset", lambda: open_at(root))
    stream = timed("ShardStream", lambda: ShardStream(dataset, "train", batch_size=8))
    for method in ("fork", "forkserver", "spawn"):
        loader = DataLoader(Walk(stream), batch_size=None, num_workers=WORKERS, multiprocessing_context=method)
        rows = list(loader)
        for kind in ("Pss", "Private_Dirty"):
            found[f"{kind} of a loader process, {method}"] = statistics.mean(row[kind] for row in rows)
    timed("first batch's rows", lambda: stream.order.rows(0, 0))
    timed("next epoch's first rows", lambda: stream.order.rows(stream.batches_per_epoch, 0))
    timed("select a class and a tenth", lambda: dataset.select(classes=["class 3"], fraction=0.1).index("train"))
    repeated = timed(
        "ShardStream with repeats", lambda: ShardStream(dataset, "train", batch_size=8, repeat_threshold=0.5)
    )
    timed("its first batch's rows", lambda: repeated.order.rows(0, 0))
    return found


def print_index_costs() -> None:
    """Print the table of two index sizes."""
    columns = []
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            root = Path(folder) / str(count)
            write_index(root, count)
            columns.append(in_fresh_process("index", str(root)))
    print(f"| | {' | '.join(f'{count:,} samples' for count in COUNTS)} |")
    print("| --- |" + " ---: |" * len(COUNTS))
    for name in columns[0]:
        unit, scale = ("MB", 1e6) if name.startswith(("Pss", "Private")) else ("s", 1)
        print(f"| {name}, {unit} | {' | '.join(f'{column[name] / scale:.3f}' for column in columns)} |")


def in_fresh_process(*arguments: str) -> Any:
    """Run one measurement in a fresh process, and return what it prints."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def write_small_samples(root: str) -> None:
    """Write two thousand samples of one small picture each."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 48, 3), 99, np.uint8)).save(buffer, "JPEG")
    instance = Instance(1, (1.0, 1.0, 20.0, 20.0), None)
    rows: list[IndexRow] = []
    shards = []
    for number in range(2):
        keys = range(number * 1000, number * 1000 + 1000)
        samples = [Sample(f"{key:016x}", buffer.getvalue(), 48, 32, (instance,)) for key in keys]
        packed = pack_shard(samples, split="train", path=shard_path("train", number))
        (Location(root) / packed.shard.path).write(packed.data)
        rows.extend(packed.rows)
        shards.append(packed.shard)
    finish_dataset(Location(root), rows, shards, [Category(1, "Thing", "/m/1")])


def measure_first_batch(root: str) -> float:
    """Return the seconds from opening the dataset to the first batch."""
    began = time.perf_counter()
    next(iter(ShardStream(open_at(root), "train", batch_size=8)))
    return time.perf_counter() - began


def print_round_trips() -> None:
    """Print the table of latencies, and the slope."""
    with S3Server() as server:
        os.environ.update(server.environment())
        server.make_bucket("opening")
        write_small_samples("s3://opening/data")
        print("\n| added latency, s | first batch, s |\n| ---: | ---: |")
        seconds = []
        for latency in LATENCIES:
            with S3Proxy(server.endpoint_url, latency=latency) as proxy:
                os.environ.update(proxy.environment())
                seconds.append(min(in_fresh_process("batch", "s3://opening/data") for _ in range(3)))
            print(f"| {latency:.2f} | {seconds[-1]:.3f} |")
        print(f"\nround trips to the first batch: {np.polyfit(LATENCIES, seconds, 1)[0]:.1f}")


def main() -> int:
    """Measure and print."""
    if sys.argv[1:2] == ["index"]:
        print(json.dumps(measure_index(sys.argv[2])))
    elif sys.argv[1:2] == ["batch"]:
        print(json.dumps(measure_first_batch(sys.argv[2])))
    else:
        require(["weed"])
        print(f"{os.cpu_count()} cores, {WORKERS} loader processes, mean of them; {BATCHES} batches of 8 each\n")
        print_index_costs()
        print_round_trips()
    return 0


if __name__ == "__main__":
    sys.exit(main())
