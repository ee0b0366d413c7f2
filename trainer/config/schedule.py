"""Pure functions of the step: its stage and learning rate, what is due, and the seed."""

from __future__ import annotations

import bisect
import hashlib
import math
from dataclasses import dataclass

from trainer.config.settings import OptimConfig, StageConfig, TrainConfig


@dataclass(frozen=True)
class Stage:
    """Steps `start` to `stop - 1` of a run (counted from 0), in which the same layers train.

    Attributes:
        number, of: 1 for the first of so many.
        layers: see `train.layers`.
        lr: factor on the learning rate.
    """

    number: int
    of: int
    layers: str
    lr: float
    start: int
    stop: int


def stages(train: TrainConfig) -> list[Stage]:
    """The stages of a run; one where `train.stages` is empty."""
    entries = train.stages or [StageConfig(train.layers, train.epochs)]
    found: list[Stage] = []
    for number, entry in enumerate(entries, 1):
        start = found[-1].stop if found else 0
        stop = start + entry.epochs * train.steps_per_epoch
        found.append(Stage(number, len(entries), entry.layers, entry.lr, start, stop))
    return found


def stage_of(train: TrainConfig, step: int) -> Stage:
    """The stage of the step after `step` steps; the last one where the run is over."""
    every = stages(train)
    return next((stage for stage in every if step < stage.stop), every[-1])


def total_steps(train: TrainConfig) -> int:
    """Steps of the whole run."""
    return stages(train)[-1].stop


def learning_rate(optim: OptimConfig, train: TrainConfig, step: int, images: int) -> float:
    """The rate of the step after `step` steps.

    A linear warm-up from a thousandth at the beginning of each stage (its optimizer begins anew), times the schedule
    over the whole run, times the stage's factor, times the linear rule for large batches (Goyal et al., "Accurate,
    Large Minibatch SGD", 2017) where `base_batch` asks for it.

    Args:
        optim, train: the settings.
        step: steps done.
        images: of one step, on all ranks.
    """
    stage = stage_of(train, step)
    warm = min((step - stage.start) / optim.warmup_steps, 1.0) if optim.warmup_steps else 1.0
    if optim.schedule == "cosine":
        wave = (1 + math.cos(math.pi * min(step / total_steps(train), 1.0))) / 2
        decay = optim.final_lr + (1 - optim.final_lr) * wave
    else:
        decay = optim.gamma ** bisect.bisect_right(sorted(optim.milestones), step)
    scale = images / optim.base_batch if optim.base_batch else 1.0
    return optim.lr * scale * stage.lr * (0.001 + 0.999 * warm) * decay


def checkpoint_is_due(train: TrainConfig, step: int) -> bool:
    """Whether the state is saved after `step` steps: every `checkpoint_steps`, and at the end of every epoch."""
    return step % train.checkpoint_steps == 0 or step % train.steps_per_epoch == 0


def evaluation_is_due(train: TrainConfig, step: int) -> bool:
    """Whether the run is evaluated after `step` steps: at the end of every `eval_epochs`-th epoch, and of the last."""
    epoch, rest = divmod(step, train.steps_per_epoch)
    return step > 0 and rest == 0 and (epoch % train.eval_epochs == 0 or step >= total_steps(train))


def fold(*numbers: int) -> int:
    """A seed of 63 bits that depends on all of the numbers and on their order."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
