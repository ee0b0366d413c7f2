"""Shards, orders and checkpoints equal those of earlier releases; see `tests/facts/make.py` for the facts."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch

from tests.facts import make

DTYPES = {"F32": torch.float32, "I64": torch.int64}


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


def facts(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((make.FACTS / f"{name}.json").read_text())
    return found


def test_build_shards_writes_the_same_shards_indexes_and_accounts() -> None:
    assert make.build_facts() == facts("builds")


def test_training_orders_are_the_same() -> None:
    assert make.order_facts() == facts("orders")


def test_a_checkpoint_resumes(tmp_path: Path) -> None:
    checkpoint = facts("checkpoint")
    state, place = checkpoint["state.json"], tmp_path / "checkpoints" / f"step-{make.STEPS:06d}"
    place.mkdir(parents=True)
    for name, entry in checkpoint["tensors"].items():
        data = safetensors.torch.save(
            {key: tensor(key, text) for key, text in entry["shapes"].items()}, metadata=entry["metadata"]
        )
        (place / name).write_bytes(data)
        state["files"][name] = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (place / "state.json").write_text(json.dumps(state).replace("RUN", str(tmp_path)))
    assert make.train(tmp_path) == 0
    [row] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (row["step"], row["position"]) == (make.STEPS + 1, make.STEPS + 1)
    assert math.isfinite(row["loss"])


def tensor(name: str, text: str) -> torch.Tensor:
    """Return small values; ones for the variance of a norm."""
    dtype, _, shape = text.partition(" ")
    size = json.loads(shape)
    if dtype == "I64" or name.endswith("running_var"):
        return torch.ones(size, dtype=DTYPES[dtype])
    return 0.02 * torch.randn(size, generator=torch.Generator().manual_seed(0))
