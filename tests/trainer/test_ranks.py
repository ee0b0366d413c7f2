"""How ranks join."""

from pathlib import Path

import pytest

from tests.trainer import tiny

PROBE = """
import sys
import torch
from torch.distributed import distributed_c10d
from trainer import ranks

patience = getattr(ranks, sys.argv[1])
accelerator = ranks.start_accelerator(timeout=patience)
backend = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
assert backend.options._timeout == patience, backend.options._timeout
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("patience", ["PATIENCE", "PATIENCE_IN_TRAINING"])
def test_ranks_wait_longer_than_torch_would(tmp_path: Path, patience: str) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    done = tiny.run(script, [patience], ranks=2)
    assert done.returncode == 0, done.stderr
