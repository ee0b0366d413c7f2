import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from benchmarks import soak
from demo.s3server import S3Server
from shards.storage.location import Location


@pytest.mark.slow
def test_epochs_with_faults_hold_every_sample_once_and_in_order(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    local = soak.write_samples(Location(str(tmp_path)), 200, per_shard=50)
    s3.upload(tmp_path, bucket)
    run = partial(soak.soak, epochs=3, workers=2, seed=4, share=0.1)
    # A new process, because loader processes that are forked from one that has read do so through fsspec.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as new:
        result = new.submit(run, s3.endpoint_url, f"s3://{bucket}", local).result()
    assert (result.wrong, result.least, result.most) == (0, 1, 1)
    assert set(result.faults) == set(soak.FAULTS)
    assert result.statistics.samples == 3 * 200
    assert result.statistics.retries > 0  # those of requests beyond the last batch are not reported


@pytest.mark.slow
def test_memory_of_a_loader_process_does_not_grow(tmp_path: Path) -> None:
    """If samples of 3 kB stayed, they would add 10 MB between the quarters."""
    local = soak.write_samples(Location(str(tmp_path)), 500)
    gc.freeze()  # or the collector of the forked process writes to, and thus copies, pages of this process
    try:
        first, last = soak.quarters(list(soak.memory(local, samples=6000, workers=1)))
    finally:
        gc.unfreeze()
    assert last - first <= 4
