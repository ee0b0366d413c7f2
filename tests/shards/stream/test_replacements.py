"""`skip_bad`: what takes the place of damaged samples, on any number of ranks and workers, and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from demo.s3proxy import Fault
from shards.common.errors import SampleError, UnavailableSampleError
from shards.format.dataset import Dataset, open_dataset
from shards.format.sample import Sample
from shards.stream.loader import loader
from shards.stream.sample_decoders import parse_sample
from tests.shards.stream.support import EPOCH, SAMPLES, keys, small_stream, take
from tests.support import Proxied, damage, sample, write_dataset

KINDS = {3: "bytes", 4: "json", 17: "image", SAMPLES - 1: "tar"}  # by row; the last two are followed by the first


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.common.back_off.SCALE", 0)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("damaged")
    write_dataset(root, {"train": [sample(n) for n in range(SAMPLES)]}, per_shard=10)
    damage(root, KINDS)
    return open_dataset(str(root))


def decoded(samples: list[Sample], visit: int) -> tuple[str, ...]:
    """The keys of a batch whose images can be decoded."""
    for one in samples:
        one.picture()
    return keys(samples)


def expected(dataset: Dataset) -> list[tuple[str, ...]]:
    """Two epochs, with the next undamaged row of the same orientation in place of each damaged one."""
    index = dataset.index("train")
    portrait = (index.height > index.width).tolist()

    def key(row: int) -> str:
        wanted = portrait[row]
        while row in KINDS or portrait[row] != wanted:
            row = (row + 1) % SAMPLES
        return index.image_id(row)

    order = small_stream(dataset).order
    return [tuple(map(key, order.rows(position, 0).tolist())) for position in range(2 * EPOCH)]


@pytest.mark.parametrize(
    ("world", "workers", "start", "options"),
    [
        (1, 0, 0, {}),
        (1, 2, 0, {}),
        (2, 2, 0, {}),
        (3, 1, 7, {}),
        (1, 0, 0, {"stages": [wds.map(dict)]}),
        (2, 0, 3, {"parse": lambda raw: parse_sample(raw)}),
    ],
)
def test_batches_have_the_same_replacements_on_any_ranks_and_after_a_resume(
    damaged: Dataset, world: int, workers: int, start: int, options: dict[str, Any]
) -> None:
    wanted, found = expected(damaged)[start:], set()
    for rank in range(world):
        stream = small_stream(
            damaged, rank=rank, world=world, start=start, skip_bad=len(KINDS), collate=decoded, **options
        )
        batches: Any = loader(stream, workers=workers)
        own = wanted[rank::world]
        assert [batch for batch, _ in zip(batches, own)] == own
        found |= {bad.image_id for bad in batches.bad_samples}
        assert len(batches.bad_samples) == len(set(batches.bad_samples))
    index = damaged.index("train")
    assert found == {index.image_id(row) for row in KINDS}


def test_one_more_damaged_sample_is_an_error_that_names_all(damaged: Dataset) -> None:
    with pytest.raises(SampleError) as caught:
        take(small_stream(damaged, collate=decoded, skip_bad=len(KINDS) - 1), EPOCH)
    index = damaged.index("train")
    for row in KINDS:
        shard = damaged.root / index.shard_paths[int(index.shard[row])]
        assert index.image_id(row) in str(caught.value)
        assert str(shard) in str(caught.value)
    assert "one more than skip_bad allows" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(SampleError) as caught:
        take(small_stream(damaged, collate=decoded), EPOCH)
    assert "skip_bad" not in str(caught.value)


def test_a_fault_of_storage_is_no_damage(remote: Dataset, proxied: Proxied) -> None:
    with proxied() as proxy:
        batches = iter(loader(small_stream(remote, skip_bad=SAMPLES)))
        next(batches)
        proxy.faults = (Fault("refuse", "GET", after=0.0),)
        with pytest.raises(UnavailableSampleError, match="access was refused"):
            list(batches)


def test_a_stream_of_damaged_samples_ends(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": [sample(n) for n in range(6)]})
    damage(tmp_path, dict.fromkeys(range(6), "json"))
    with pytest.raises(SampleError, match="is not in the shard format"):
        take(small_stream(open_dataset(str(tmp_path)), batch_size=1, skip_bad=100), 2)
