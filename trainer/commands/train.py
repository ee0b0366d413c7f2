"""Train Mask R-CNN on a shard dataset, streaming.

    accelerate launch trainer/train.py --config configs/traffic.yaml --data.shards s3://bucket/prefix --run.dir runs/one

    # all GPUs of a machine; or, without GPUs, two CPU processes
    accelerate launch --multi_gpu --num_processes 8 trainer/train.py ...
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 trainer/train.py ...

The same command again continues from the newest checkpoint in --run.dir, with any number of processes. With the same
number the losses are those of an unbroken run: a step depends on nothing but the weights, the optimizer's state, the
seed, and the position G in the row of global batches (see `shards/order/epoch_order.py`). SIGTERM and SIGINT end the
run after the
step under way, with a checkpoint and exit status 143 or 130.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from shards.common.text import counted
from trainer.commands import command_line as command
from trainer.config.schedule import checkpoint_is_due, evaluation_is_due, fold, learning_rate, stage_of, total_steps
from trainer.config.settings import Config, ConfigError
from trainer.config.yaml_config import add_arguments, from_arguments
from trainer.run.distributed import (
    TrainingError,
    all_ranks,
    bad_losses,
    from_main,
    mean_losses,
    rank_report,
    weighted_sum,
)
from trainer.run.run_state import Training, begin_stage, norm_statistics, save_state, set_up, share_buffers

if TYPE_CHECKING:  # torch takes seconds to import: not for --help or a wrong argument
    from torchvision.models.detection import MaskRCNN

    from shards.stream.loader import LoaderStatistics
    from trainer.data.instances import Batch
    from trainer.run.runlog import RunLog

log = logging.getLogger("trainer.commands.train")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return command.run("train", lambda: train(parse(arguments)) and 0)


def parse(arguments: Sequence[str] | None) -> Config:
    """Settings of the command line; UserError for a wrong one."""
    parser = command.Parser(prog="train.py", description="Train Mask R-CNN on a shard dataset.")
    add_arguments(parser)
    config = from_arguments(parser.parse_args(arguments))
    if not config.data.shards:
        raise ConfigError("data.shards is empty: give --data.shards, such as s3://bucket/prefix")
    return config


def train(config: Config) -> MaskRCNN:
    """Train until all epochs are done, from the newest checkpoint of `run.dir` if there is one.

    Every rank calls this, and gets the same weights back.

    Raises:
        UserError: settings or data are wrong, storage fails, or losses are not finite.
        command.Stopped: a signal ended the run, which is saved.
    """
    command.start_logging()
    t = set_up(config)

    from shards.stream.loader import loader
    from trainer.run.runlog import RunLog

    total, record = total_steps(config.train), None
    if t.accelerator.is_main_process:
        record = RunLog(t.run, config, t.accelerator, t.step, total)
    evaluated = from_main(record.last_evaluation if record else 0)
    if t.step >= total:
        log.info("the run in %s is finished (%s): raise train.epochs to go on", t.run, counted(t.step, "step"))

    pin = t.accelerator.device.type == "cuda"
    data = loader(t.stream, workers=config.data.workers, pin_memory=pin)
    batches = iter(data)
    with command.Signals() as signals:
        stopped = 0
        while True:
            # First in the loop: an evaluation that was cut short is made up for when the run continues.
            if config.data.val_split and evaluated < t.step and evaluation_is_due(config.train, t.step) and not stopped:
                evaluate_now(t, record)
                evaluated = t.step
            if t.step >= total or stopped:
                break
            if t.stage != stage_of(config.train, t.step):
                begin_stage(t)

            began, before = time.perf_counter(), data.statistics
            mine = [next(batches) for _ in range(config.train.accumulate)]
            row, stopped = train_step(t, mine, data.statistics.since(before), signals)
            if record:
                record.add_step(row, time.perf_counter() - began)
            if checkpoint_is_due(config.train, t.step) or stopped:
                share_buffers(t)
                if record:
                    record.flush(draw=t.step % config.train.steps_per_epoch == 0 or bool(stopped))
                    save_state(t)

    t.accelerator.wait_for_everyone()
    t.accelerator.end_training()
    if record:
        record.close()
    if stopped:
        raise command.Stopped(
            stopped,
            f"stopped by a signal after step {t.step}, which is saved in {t.run}: the same command goes on from there",
        )
    return t.network


def train_step(
    t: Training, batches: list[Batch], done: LoaderStatistics, signals: command.Signals
) -> tuple[dict[str, Any], int]:
    """One step of all ranks.

    Args:
        t: moved on by one step.
        batches: of this rank, `train.accumulate` many.
        done: what this rank's loader did for them.
        signals: what this rank was sent.

    Returns:
        The step's row in metrics.jsonl but for its times (losses averaged over the ranks, and what all their loaders
        did), and the signal that any rank was sent.

    Raises:
        TrainingError: a loss or the gradient is not finite, and no more steps may be skipped; on every rank alike.
    """
    import torch

    config, accelerator = t.config, t.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    images = sum(len(batch) for batch in batches) * world
    rate = learning_rate(config.optim, config.train, t.step, images)
    for group in t.optimizer.param_groups:
        group["lr"] = rate

    may_skip, rows = t.skipped < config.train.skip_nonfinite, []
    statistics = norm_statistics(t.network) if may_skip else []
    for number, batch in enumerate(batches, 1):
        # What is random in a step (which RoIs train) belongs to its batch: nothing that came before plays a part.
        torch.manual_seed(fold(config.train.seed, t.position + rank))
        with nullcontext() if number == len(batches) else accelerator.no_sync(t.model):
            losses = t.model(batch.to(accelerator.device))
            accelerator.backward(weighted_sum(losses, config.loss))
        rows.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        t.position += world

    # One exchange a step tells every rank all losses, so that all do the same; what the loaders did; and a signal.
    values = torch.stack(rows)
    more = values.new_tensor([*rank_report(done, accelerator.device), signals.number])
    table = accelerator.gather(torch.cat((values.mean(0), more))[None]).tolist()
    bad = [key for batch, row in zip(batches, rows) if not row.isfinite().all() for key in batch.image_ids]
    trouble = bad_losses(list(losses), table, bad)
    norm = float(accelerator.clip_grad_norm_(t.model.parameters(), config.optim.clip_norm or math.inf))
    if not trouble and not math.isfinite(norm) and accelerator.scaler is None:  # fp16's scaler skips such a step itself
        trouble = f"the gradient is {norm}, though every loss is finite"
    if not trouble:
        t.optimizer.step()
    elif may_skip:
        t.skipped += 1
        for buffer, before in statistics:
            buffer.copy_(before)
        log.warning("step %d is skipped (%d of %d): %s", t.step + 1, t.skipped, config.train.skip_nonfinite, trouble)
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # it has seen these gradients, and waits to be told that the step is done
    else:
        raise TrainingError(f"step {t.step + 1}: {trouble}: lower optim.lr, or look at the samples")
    t.optimizer.zero_grad()
    if t.ema is not None and not trouble:
        t.ema.update_parameters(t.network)
    t.step += 1
    means = mean_losses(list(losses), table)
    row = {
        "step": t.step,
        "epoch": (t.step - 1) // config.train.steps_per_epoch + 1,
        "position": t.position,
        "data_epochs": t.position / t.stream.batches_per_epoch,
        "loss": weighted_sum(means, config.loss),
        "losses": means,
        "lr": rate,
        "grad_norm": norm,
        "images": images,
        **all_ranks([row[len(losses) : -1] for row in table]),
    }
    return row | ({"skipped": trouble} if trouble else {}), int(max(row[-1] for row in table))


def evaluate_now(t: Training, record: RunLog | None) -> None:
    """Rate the weights of all ranks; the main one draws pictures, and keeps the best weights by mask AP."""
    import torch

    from trainer.commands.evaluate import evaluate, summary
    from trainer.report.pictures import Pictures

    split, data = t.config.data.val_split, t.config.data
    pictures = Pictures(t.dataset.categories, t.config.run.pictures if record else 0)
    with torch.compiler.set_stance("force_eager"):  # its images have many shapes: each would be compiled anew
        result = evaluate(t.evaluated, t.dataset, split, t.accelerator, data, t.config.train, watch=pictures.add)
    if record and result:
        log.info("evaluation after step %d\n%s", t.step, summary(result))
        pictures.write(t.run, t.step)
        row = {"step": t.step, "split": split, **result.to_json()}
        if record.is_best(row):
            save_state(t, best=True)
        record.add_evaluation(row)  # last: killed before, the run rates these weights again when it goes on


if __name__ == "__main__":
    sys.exit(main())
