import copy
import math
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from trainer.config.settings import OptimConfig
from trainer.run.optim import MovingAverage, apply_update, load_state, make_optimizer, mark_nonfinite


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


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_update_that_is_not_done_changes_nothing_not_even_the_first(kind: Literal["sgd", "adamw"]) -> None:
    built, plain = network(), network()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(make_optimizer(built, OptimConfig(optimizer=kind, lr=0.1)))
    reference = make_optimizer(plain, OptimConfig(optimizer=kind, lr=0.1))
    for losses in ([1.0, torch.nan], [1.0, 2.0], [torch.inf, 0.0], [1.0, 2.0], [1.0, 2.0]):
        done = all(map(math.isfinite, losses))
        for one, other in zip(built.parameters(), plain.parameters(), strict=True):
            one.grad, other.grad = torch.ones_like(one), torch.ones_like(other)
        mark_nonfinite(built, torch.tensor(losses))
        norm = torch.nn.utils.clip_grad_norm_(built.parameters(), 1e9)
        assert bool(norm.isfinite()) == done
        apply_update(optimizer, norm.isfinite())
        if done:
            reference.step()
        assert all(torch.equal(*pair) for pair in zip(built.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(built[2].weight, network()[2].weight)


def trained(built: Any, optimizer: Any, seeds: range) -> Any:
    """The weights after one step for each seed."""
    for seed in seeds:
        images = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
        built(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return built.state_dict()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_load_state_resumes_to_the_bit_in_any_memory_format(
    kind: Literal["sgd", "adamw"], memory_format: torch.memory_format
) -> None:
    settings, built = OptimConfig(optimizer=kind, lr=0.1), network().to(memory_format=memory_format)
    optimizer = make_optimizer(built, settings)
    trained(built, optimizer, range(2))
    resumed, state = copy.deepcopy(built), copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():  # as a checkpoint
        values |= {name: value.contiguous() for name, value in values.items()}
    again: Any = make_optimizer(resumed, settings)
    load_state(again, state)
    found, expected = trained(resumed, again, range(2, 4)), trained(built, optimizer, range(2, 4))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_load_state_keeps_the_momentum_that_a_checkpoint_lacks() -> None:
    """A run that began without momentum; the first step after it may be skipped."""
    built = network()
    before: Any = make_optimizer(built, OptimConfig(momentum=0.0))
    trained(built, before, range(1))
    optimizer: Any = make_optimizer(built, OptimConfig(momentum=0.9))
    load_state(optimizer, before.state_dict())
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in built.parameters() if p.requires_grad)


def test_the_average_follows_its_formula_across_a_resume_and_skipped_steps() -> None:
    built = network()
    average: Any = MovingAverage(built, 0.7, 0)
    expected = built[2].weight.detach().clone()
    for n in range(8):
        with torch.no_grad():
            built[2].weight.add_(torch.randn_like(built[2].weight))
        built[1].running_mean.add_(1.0)
        if n == 4:  # as a resumed run
            again: Any = MovingAverage(built, 0.7, n)
            again.module.load_state_dict(average.module.state_dict())
            average = again
        average.update(built, torch.tensor(False))
        average.update(built, torch.tensor(True))
        share = 1.0 if n == 0 else 1 - min(0.7, (1 + n) / (10 + n))
        expected = expected + share * (built[2].weight.detach() - expected)
        assert torch.allclose(average.module[2].weight, expected, atol=1e-6)
    assert 0 < average.module[1].running_mean[0] < built[1].running_mean[0]
    assert torch.equal(average.module[0].weight, built[0].weight)
    assert not average.module.training
