"""A loader that went through `accelerator.prepare` is refused, on one process and on two, with the real accelerate."""

from pathlib import Path

import pytest

from tests.support import sample, write_dataset
from tests.trainer import tiny

SCRIPT = """
import itertools, sys
from pathlib import Path
from accelerate import Accelerator
from torch.utils.data import DataLoader
from shards.format.dataset import open_dataset
from shards.common.errors import DatasetError
from shards.stream.loader import loader
from shards.stream.streams import EvalStream, ShardStream

accelerator = Accelerator(cpu=True)
share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
dataset = open_dataset(sys.argv[1])
lines = []


def refused(name, read):
    try:
        next(iter(read))
    except DatasetError as error:
        lines.append(f"{name}: {error}")
    else:
        lines.append(f"{name}: was read")


streams = {
    "train": ShardStream(dataset, "train", batch_size=2, **share, collate=lambda batch, visit: len(batch)),
    "eval": EvalStream(dataset, "train", batch_size=2, **share, collate=lambda batch, visit: len(batch)),
}
for name, stream in streams.items():
    for workers in (0, 1):
        for dispatch in (None, False):
            accelerator.dataloader_config.dispatch_batches = dispatch
            own = DataLoader(stream, batch_size=None, num_workers=workers)
            refused(f"{name}, {workers}, {dispatch}, own", accelerator.prepare(own))
            refused(f"{name}, {workers}, {dispatch}, inner", accelerator.prepare(loader(stream, workers=workers).inner))

# Our loader is no DataLoader: prepare hands it back as it is, and it works.
whole = loader(ShardStream(dataset, "train", batch_size=2, **share))
assert accelerator.prepare(whole) is whole
expected = ShardStream(dataset, "train", batch_size=2, **share)
for batch, wanted in itertools.islice(zip(whole, expected), 3):
    assert batch == wanted
Path(sys.argv[2], f"rank-{share['rank']}").write_text("\\n".join(lines))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_prepared_loader_is_refused_on_every_rank_with_the_reason(tmp_path: Path, processes: int) -> None:
    write_dataset(tmp_path / "data", {"train": [sample(n) for n in range(12)]})
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = tiny.run(script, [str(tmp_path / "data"), str(tmp_path)], ranks=processes)
    assert done.returncode == 0, done.stderr
    for rank in range(processes):
        lines = (tmp_path / f"rank-{rank}").read_text().splitlines()
        assert len(lines) == 16
        for line in lines:
            assert "accelerator.prepare" in line
            assert "prepare the model and the optimizer only" in line
