"""What mypy makes of a loop of a user's own: the guide's examples, and the type of a batch."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY

GUIDE = REPOSITORY / "docs" / "streaming.md"

HEAD = """
import torch
from torch import Tensor

from shards.format.dataset import Dataset
from shards.stream.loader import loader
from shards.order.mixture import Mix
from shards.stream.sample_decoders import webdataset_sample
from shards.format.sample import Sample
from shards.stream.streams import EvalStream, ShardStream
from tests.support import REPOSITORY

def tensors(samples: list[Sample], visit: int) -> Tensor:
    return torch.zeros(len(samples))

def untyped(samples, visit):
    return {}

def batches(dataset: Dataset, mix: Mix) -> None:
"""
SAMPLES = "list[shards.format.sample.Sample]"
TENSOR = "torch._tensor.Tensor"
CASES = {
    'next(iter(ShardStream(dataset, "train", batch_size=4, seed=1)))': SAMPLES,
    'next(iter(loader(ShardStream(mix, "train", batch_size=4), workers=2)))': SAMPLES,
    'next(iter(loader(EvalStream(dataset, "val", batch_size=4, rank=1, world=2))))': SAMPLES,
    'next(iter(ShardStream(dataset, "train", batch_size=4, parse=webdataset_sample)))': "list[dict[str, Any]]",
    'next(iter(EvalStream(dataset, "val", batch_size=4, parse=webdataset_sample)))': "list[dict[str, Any]]",
    'next(iter(loader(ShardStream(dataset, "train", batch_size=4, collate=tensors))))': TENSOR,
    'next(iter(EvalStream(dataset, "val", batch_size=4, collate=tensors)))': TENSOR,
    'next(iter(ShardStream(dataset, "train", batch_size=4, collate=untyped)))': "Any",
    'next(iter(ShardStream(dataset, "train", batch_size=4, parse=webdataset_sample, collate=lambda s, v: v)))': "int",
}


def mypy(folder: Path, *files: str) -> list[str]:
    """What it tells, a line each; not strict, and with no settings of this repository's."""
    options = ["--config-file=", "--follow-imports=silent", "--ignore-missing-imports", "--no-error-summary"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", folder / "cache", *files],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return done.stdout.splitlines()


def modules(blocks: list[str]) -> list[str]:
    """Each block as a module that imports from those before what it uses of them: a name may change its type between
    two blocks, which mypy allows in no module."""
    made: list[str] = []
    where: dict[str, int] = {}
    for number, block in enumerate(blocks):
        names = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)]
        own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        used = sorted({name.id for name in names} - own)
        made.append("".join(f"from block{where[name]} import {name}\n" for name in used if name in where) + block)
        tops = [
            alias.asname or alias.name for node in ast.walk(ast.parse(block)) for alias in getattr(node, "names", [])
        ]
        defined = {node.name for node in ast.parse(block).body if isinstance(node, ast.FunctionDef)}
        where |= dict.fromkeys([*own, *tops, *defined], number)
    return made


@pytest.mark.slow
def test_a_type_checker_knows_the_batches_and_takes_the_guide(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names = [f"block{number}.py" for number in range(len(blocks))]
    for name, text in zip(names, modules(blocks)):
        (tmp_path / name).write_text(text)
    (tmp_path / "cases.py").write_text(HEAD + "".join(f"    reveal_type({case})\n" for case in CASES))
    told = mypy(tmp_path, "cases.py", *names)
    revealed = [re.sub(r'.*Revealed type is "(.*)"$', r"\1", line) for line in told if "Revealed type" in line]
    assert dict(zip(CASES, revealed)) == CASES
    assert [line for line in told if "Revealed type" not in line] == []
