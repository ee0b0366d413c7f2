"""The stream for as long as a test may take; `benchmarks/soak.py` does the same for hours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import soak
from demo.s3server import S3Server
from shards.storage.location import Location
from tests.support import REPOSITORY


@pytest.mark.slow
def test_five_epochs_under_random_faults_hold_every_sample_once_and_in_order(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    local = soak.write_samples(Location(str(tmp_path)), 400, per_shard=50)
    s3.upload(tmp_path, bucket)
    result = soak.soak(s3.endpoint_url, f"s3://{bucket}", local, epochs=5, workers=2, seed=4, share=0.04)
    assert (result.wrong, result.least, result.most) == (0, 1, 1)
    assert set(result.faults) == set(soak.FAULTS)
    assert result.statistics.samples == 5 * 400
    assert result.statistics.retries >= sum(result.faults.values()) - result.faults["corrupt"]


@pytest.mark.slow
def test_memory_of_a_loader_process_is_flat(tmp_path: Path) -> None:
    """Samples of 3 kB that stayed would add 10 MB between the quarters."""
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks" / "soak.py"),
        "memory",
        "--samples",
        "6000",
        "--growth",
        "4",
    ]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run([*command, "--workers", "1"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 2000 | 6000 | " in done.stdout
