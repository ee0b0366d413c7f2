"""How ranks join."""

from pathlib import Path

import pytest

from tests.trainer import tiny

PROBE = """
import sys
import torch
from torch.distributed import distributed_c10d
from trainer.run import distributed as ranks

timeout = getattr(ranks, sys.argv[1])
accelerator = ranks.start_accelerator(timeout=timeout)
backend = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
assert backend.options._timeout == timeout, backend.options._timeout
accelerator.wait_for_everyone()
accelerator.end_training()
"""

TRIES = """
import sys
from trainer.run import distributed as ranks
from shards.common.errors import StorageError
from shards.storage.location import Location

accelerator = ranks.start_accelerator()
if not accelerator.is_main_process:
    ranks.check_writable = None  # the main rank alone may try
ranks.main_can_write(Location(f"{sys.argv[1]}/out"), "--out", accelerator)
try:
    ranks.main_can_write(Location(f"{sys.argv[1]}/probe.py"), "--out", accelerator)
except StorageError as error:
    open(f"{sys.argv[1]}/rank-{accelerator.process_index}", "w").write(str(error))
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("timeout", ["TIMEOUT", "TRAINING_TIMEOUT"])
def test_ranks_wait_longer_than_torch_would(tmp_path: Path, timeout: str) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    done = tiny.run(script, [timeout], ranks=2)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_all_ranks_learn_that_the_main_one_cannot_write(tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(TRIES)
    done = tiny.run(script, [str(tmp_path)], ranks=2)
    assert done.returncode == 0, done.stderr
    told = f"{script}: cannot be written ({script} is not a writable folder): choose another --out"
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == [told, told]
    assert {path.name for path in tmp_path.iterdir()} == {"probe.py", "rank-0", "rank-1"}
