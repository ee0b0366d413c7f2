"""Pure functions of the step: stage, learning rate, whether a checkpoint or evaluation is due, and seeds."""

import bisect
import hashlib
import math
from dataclasses import dataclass

from trainer.config.settings import OptimConfig, StageConfig, TrainConfig


@dataclass(frozen=True)
class Stage:
    """Steps `start` to `stop`, exclusive, in which the same layers train; `lr` is a factor on the learning rate."""

    number: int
    of: int
    layers: str
    lr: float
    start: int
    stop: int


def stages(train: TrainConfig) -> list[Stage]:
    """Return the stages of a run: a single one if `train.stages` is empty."""
    entries = train.stages or [StageConfig(train.layers, train.epochs)]
    found: list[Stage] = []
    for number, entry in enumerate(entries, 1):
        start = found[-1].stop if found else 0
        stop = start + entry.epochs * train.steps_per_epoch
        found.append(Stage(number, len(entries), entry.layers, entry.lr, start, stop))
    return found


def stage_of(train: TrainConfig, step: int) -> Stage:
    """Return the stage of the step that follows `step` steps; the last stage after the end of the run."""
    every = stages(train)
    return next((stage for stage in every if step < stage.stop), every[-1])


def total_steps(train: TrainConfig) -> int:
    """Return the number of steps of a run."""
    return stages(train)[-1].stop


def learning_rate(optim: OptimConfig, train: TrainConfig, step: int, images: int) -> float:
    """Return the learning rate of the step that follows `step` steps, with `images` per step on all ranks.

    The product of `optim.lr`, a linear warm-up from 1/1000 in each stage (which has a new optimizer), the schedule over
    the whole run, the factor of the stage and, if `base_batch` is set, the linear scaling rule (Goyal et al.,
    "Accurate, Large Minibatch SGD", 2017).
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
    """Return whether to save after `step` steps: every `checkpoint_steps` steps, and after every epoch."""
    return step % train.checkpoint_steps == 0 or step % train.steps_per_epoch == 0


def evaluation_is_due(train: TrainConfig, step: int) -> bool:
    """Return whether to evaluate after `step` steps: after every `eval_epochs` epochs, and after the last epoch."""
    epoch, rest = divmod(step, train.steps_per_epoch)
    return step > 0 and rest == 0 and (epoch % train.eval_epochs == 0 or step >= total_steps(train))


def fold(*numbers: int) -> int:
    """Return a seed of 63 bits that depends on all numbers and on their order."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
