"""Pure functions of the step: the learning rate, what is due, and the seed."""

from __future__ import annotations

import bisect
import hashlib

from trainer.config import OptimConfig, TrainConfig


def learning_rate(optim: OptimConfig, step: int) -> float:
    """The rate of the step after `step` steps: a linear warm-up from a thousandth, then a factor at each milestone."""
    warm = min(step / optim.warmup_steps, 1.0) if optim.warmup_steps else 1.0
    return optim.lr * (0.001 + 0.999 * warm) * optim.gamma ** bisect.bisect_right(sorted(optim.milestones), step)


def total_steps(train: TrainConfig) -> int:
    """Steps of the whole run."""
    return train.epochs * train.steps_per_epoch


def checkpoint_is_due(train: TrainConfig, step: int) -> bool:
    """Whether the state is saved after `step` steps: every `checkpoint_steps`, and at the end of every epoch."""
    return step % train.checkpoint_steps == 0 or step % train.steps_per_epoch == 0


def evaluation_is_due(train: TrainConfig, step: int) -> bool:
    """Whether the run is evaluated after `step` steps: at the end of every `eval_epochs`-th epoch, and of the last."""
    epoch, rest = divmod(step, train.steps_per_epoch)
    return step > 0 and rest == 0 and (epoch % train.eval_epochs == 0 or epoch >= train.epochs)


def fold(*numbers: int) -> int:
    """A seed of 63 bits that depends on all of the numbers and on their order."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
