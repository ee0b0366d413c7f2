"""The step under `torch.compile`: whole graphs, few of them, and the same losses."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from tests.trainer.batches import LOSSES, SCENES, batch_of, gradients, shallow_network
from trainer.step import trainable
from trainer.step.trainable import Trainable


def test_parts_compile_as_whole_graphs_and_only_once_per_shape() -> None:
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return aot_eager(graph, inputs)

    network = shallow_network()
    batches = [batch_of(SCENES), batch_of(SCENES[::-1])]
    step = Trainable(network, fixed_shapes=True)
    keys = [step.draw_keys(batch) for batch in batches]
    expected = [step(*one) for one in zip(batches, keys, strict=True)]
    torch._dynamo.reset()
    step.compile_parts(backend=backend)
    found = [step(*one) for one in zip(batches, keys, strict=True)]
    assert len(graphs) == 4
    for one, other in zip(found, expected, strict=True):
        for name in LOSSES:
            assert one[name].item() == pytest.approx(other[name].item(), rel=1e-6)
    own, others = gradients(network, found[1]), gradients(network, expected[1])
    assert all(torch.allclose(own[name], others[name], rtol=1e-4, atol=1e-6) for name in others)


def test_a_step_that_is_compiled_again_may_make_as_many_graphs_as_the_first() -> None:
    """As in the next stage, which trains other layers of the same network."""
    network, batch = shallow_network(), batch_of(SCENES)
    with torch._dynamo.config.patch(cache_size_limit=1), mock.patch.object(trainable, "MOST_GRAPHS", 1):
        for is_trained in (True, False):
            network.backbone.requires_grad_(is_trained)
            step = Trainable(network)
            step.compile_parts(backend="eager")
            maps, *_ = step.backbone_stage(batch.images, batch.sizes)
            assert maps[0].requires_grad == is_trained
