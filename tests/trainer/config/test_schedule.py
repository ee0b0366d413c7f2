import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import schedule
from trainer.config.schedule import Stage, fold, learning_rate, stages
from trainer.config.settings import OptimConfig, StageConfig, TrainConfig

LONG = TrainConfig(epochs=10, steps_per_epoch=10)
STAGED = TrainConfig(
    epochs=99, steps_per_epoch=10, stages=[StageConfig("heads", 2), StageConfig("4+", 3), StageConfig("all", 1, 0.1)]
)


def test_stages_follow_each_other_and_one_setting_is_one_stage() -> None:
    assert stages(STAGED) == [
        Stage(1, 3, "heads", 1.0, 0, 20),
        Stage(2, 3, "4+", 1.0, 20, 50),
        Stage(3, 3, "all", 0.1, 50, 60),
    ]
    assert [schedule.stage_of(STAGED, step).layers for step in (0, 19, 20, 49, 50, 59, 60)] == [
        *("heads", "heads", "4+", "4+", "all", "all", "all")
    ]
    assert schedule.total_steps(STAGED) == 60
    assert stages(TrainConfig(epochs=3, steps_per_epoch=5, layers="5+")) == [Stage(1, 1, "5+", 1.0, 0, 15)]


def test_the_rate_warms_up_and_steps_down() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10, milestones=[20, 30], gamma=0.5)
    assert learning_rate(optim, LONG, 0, 8) == pytest.approx(0.001)
    assert learning_rate(optim, LONG, 5, 8) == pytest.approx(0.001 + 0.999 / 2)
    rates = [learning_rate(optim, LONG, step, 8) for step in (10, 19, 20, 29, 30, 99)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert learning_rate(OptimConfig(lr=0.1, warmup_steps=0), LONG, 0, 8) == 0.1


def test_a_cosine_falls_over_the_whole_run() -> None:
    optim = OptimConfig(lr=2.0, warmup_steps=0, schedule="cosine", final_lr=0.1)
    assert learning_rate(optim, LONG, 0, 8) == 2.0
    assert learning_rate(optim, LONG, 50, 8) == pytest.approx(2.0 * 0.55)
    assert learning_rate(optim, LONG, 100, 8) == pytest.approx(0.2)


def test_each_stage_warms_up_and_has_its_factor() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(optim, STAGED, step, 8) for step in (19, 20, 22, 24, 50, 52, 54)]
    assert rates == pytest.approx([1, 0.001, 0.001 + 0.999 / 2, 1, 0.0001, 0.1 * (0.001 + 0.999 / 2), 0.1])


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(0, 100))
def test_the_rate_is_linear_in_the_batch_where_it_is_asked_for(images: int, base: int, step: int) -> None:
    fixed = learning_rate(OptimConfig(), LONG, step, images)
    assert learning_rate(OptimConfig(), LONG, step, 8) == fixed
    scaled = learning_rate(OptimConfig(base_batch=base), LONG, step, images)
    assert math.isclose(scaled, fixed * images / base)


def test_checkpoints_and_evaluations_are_due_at_epoch_ends() -> None:
    settings = TrainConfig(epochs=5, steps_per_epoch=10, checkpoint_steps=4, eval_epochs=2)
    assert [step for step in range(1, 21) if schedule.checkpoint_is_due(settings, step)] == [4, 8, 10, 12, 16, 20]
    assert [step for step in range(51) if schedule.evaluation_is_due(settings, step)] == [20, 40, 50]


def test_seeds_differ_by_every_number_and_its_place() -> None:
    seeds = {fold(0, 1), fold(1, 0), fold(0, 0), fold(1, 1), fold(1), fold(11)}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
