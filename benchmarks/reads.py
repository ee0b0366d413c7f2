"""Processor time of one small read from S3: ours beside s3fs, in one run on one machine.

    python benchmarks/reads.py

A real S3 server (SeaweedFS) on loopback without added latency; the time is this process's own, all threads, so the
server does not count. Prints a Markdown table.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo.s3server import S3Server
from shards.ranges import Read, read_many
from shards.storage import Location

COUNT, RANGE, WHOLE = 1000, 2000, 164_000


def main() -> int:
    """Measure and print."""
    with S3Server() as server:
        os.environ.update(server.environment())
        server.make_bucket("reads")
        (Location("s3://reads") / "zip").write(os.urandom(RANGE * COUNT))
        (Location("s3://reads") / "jpg").write(os.urandom(WHOLE))
        print(f"{COUNT} reads, 32 in flight, {os.cpu_count()} cores; ms of processor time a read\n")
        print("| | s3fs | ours | ratio |")
        print("| --- | ---: | ---: | ---: |")
        starts = [n * RANGE for n in range(COUNT)]
        ends = [start + RANGE for start in starts]
        for anonymous in (False, True):
            part, whole = (Location(f"s3://reads/{name}", anonymous) for name in ("zip", "jpg"))
            kind = "unsigned" if anonymous else "signed"
            row(
                f"ranges of {RANGE} bytes, {kind}",
                lambda part=part: part.fs.cat_ranges([part.path] * COUNT, starts, ends, batch_size=32),
                lambda part=part: read_many([Read(part, s, e) for s, e in zip(starts, ends, strict=True)]),
            )
            row(
                f"objects of {WHOLE} bytes, {kind}",
                lambda whole=whole: whole.fs.cat_ranges([whole.path] * COUNT, None, None, batch_size=32),
                lambda whole=whole: read_many([Read(whole)] * COUNT),
            )
    return 0


def row(name: str, theirs: Callable[[], object], ours: Callable[[], object]) -> None:
    """Time both, each once to warm up and once to measure."""
    times = []
    for function in (theirs, ours):
        function()
        start = time.process_time()
        function()
        times.append(1000 * (time.process_time() - start) / COUNT)
    print(f"| {name} | {times[0]:.3f} | {times[1]:.3f} | {times[0] / times[1]:.1f} |")


if __name__ == "__main__":
    sys.exit(main())
