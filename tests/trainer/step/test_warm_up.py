"""Warming up a compiled step: every graph that training may need is made before the first step."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.batches import shallow_network, small_network
from trainer.config.settings import DataConfig, LossConfig
from trainer.run.optim import frozen_copy
from trainer.step.trainable import Trainable
from trainer.step.warm_up import empty_batch, row_counts, run_all_shapes, warm_up


def test_row_counts_reach_the_limit_of_objects() -> None:
    assert [list(row_counts(limit)) for limit in (0, 8, 9, 100)] == [[8], [8], [8, 16], [8, 16, 32, 64, 128]]


def test_warm_up_runs_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "trainer.step.warm_up.run_all_shapes",
        lambda step, batch, teacher: ran.append((*batch.images.shape, batch.boxes.shape[1])),
    )
    data = DataConfig(batch_size=2, min_size=64, max_size=96, resize="oriented", max_instances=10)
    warm_up(Trainable(small_network()), data, 4, torch.device("cpu"))
    assert sorted(ran) == [(2, 3, *size, rows) for size in ((64, 96), (96, 64)) for rows in (8, 16)]


@pytest.mark.parametrize("has_teacher", [False, True])
def test_after_warm_up_no_batch_is_compiled_and_nothing_has_changed(has_teacher: bool) -> None:
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append("")
        return graph

    network = shallow_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    teacher = frozen_copy(network) if has_teacher else None
    step = Trainable(network, LossConfig(unmasked="masks" if has_teacher else "box"))
    torch._dynamo.reset()
    step.compile_parts(backend=backend)
    data = DataConfig(batch_size=2, min_size=64, max_size=64, resize="square", max_instances=8)
    warm_up(step, data, 4, torch.device("cpu"), teacher)
    made = len(graphs)
    assert 4 <= made <= 5  # torch may choose other convolutions for few RoIs: a second mask branch
    step(empty_batch(2, 64, 64, 8, 4), teacher=teacher)
    assert len(graphs) == made
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_run_all_shapes_holds_one_mask_branch_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainable(small_network(), fixed_shapes=True)
    branch, made = step.mask_branch, list[weakref.ref[Tensor]]()

    def watched(*arguments: Any) -> dict[str, Tensor]:
        assert all(loss() is None for loss in made)
        found = branch(*arguments)
        made.append(weakref.ref(found["loss_mask"]))
        return found

    monkeypatch.setattr(step, "mask_branch", watched)
    batch = empty_batch(2, 64, 96, 8, 4)
    run_all_shapes(step, batch)
    assert len(made) == len(step.mask_slots(batch))
