"""The memory of a training step, counted on the CPU."""

import torch

from benchmarks.memory import LiveBytes


def test_live_bytes_counts_storages_once_until_the_last_tensor_and_the_graph_are_gone() -> None:
    weight = torch.ones(1000, requires_grad=True)  # 4000 bytes each
    counter = LiveBytes()
    counter.add(weight)
    with counter:
        first = weight * 2
        view = first[:10]
        assert counter.live == 8000
        second = first.sigmoid()  # its backward pass needs the result
        del first
        assert counter.live == 12000
        del view
        assert counter.live == 8000
        loss = second.sum()
        del second
        assert counter.live == 8004
        loss.backward()
        del loss
    assert counter.live == 8000  # the weight and its gradient
    assert counter.peak >= 12004
