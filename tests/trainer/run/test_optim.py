from typing import Any, Literal

import pytest
import torch
from torch import nn

from trainer.config.settings import OptimConfig
from trainer.run.optim import averaged, make_optimizer


def network() -> Any:
    torch.manual_seed(0)
    built: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    built[0].weight.requires_grad_(False)
    return built


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_make_optimizer_takes_trainable_parameters_and_may_exempt_norms_from_decay(
    kind: Literal["sgd", "adamw"],
) -> None:
    built = network()
    everything = make_optimizer(built, OptimConfig(optimizer=kind, weight_decay=0.5))
    assert [len(group["params"]) for group in everything.param_groups] == [5]
    split = make_optimizer(built, OptimConfig(optimizer=kind, weight_decay=0.5, decay_norms=False))
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in split.param_groups] == [
        (0.5, [4]),
        (0.0, [1, 1, 1, 1]),
    ]
    # With zero gradients, only weight decay changes a weight.
    before = [parameter.detach().clone() for parameter in built.parameters()]
    for parameter in built.parameters():
        parameter.grad = torch.zeros_like(parameter)
    split.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, built.parameters())]
    assert moved == [False, False, False, False, True, False]


def test_the_average_follows_its_formula_across_a_resume() -> None:
    built = network()
    average: Any = averaged(built, 0.7, 0)
    expected = built[2].weight.detach().clone()
    for n in range(8):
        with torch.no_grad():
            built[2].weight.add_(torch.randn_like(built[2].weight))
        built[1].running_mean.add_(1.0)
        if n == 4:  # as a resumed run
            again: Any = averaged(built, 0.7, n)
            again.module.load_state_dict(average.module.state_dict())
            average = again
        average.update_parameters(built)
        share = 1.0 if n == 0 else 1 - min(0.7, (1 + n) / (10 + n))
        expected = expected + share * (built[2].weight.detach() - expected)
        assert torch.allclose(average.module[2].weight, expected, atol=1e-6)
    assert 0 < average.module[1].running_mean[0] < built[1].running_mean[0]
    assert torch.equal(average.module[0].weight, built[0].weight)
    assert not average.module.training
