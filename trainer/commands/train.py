"""Train Mask R-CNN on a shard dataset, streaming.

    accelerate launch -q trainer/train.py --config traffic --data.shards s3://bucket/prefix --run.dir runs/one

    # all GPUs of a machine; or, without GPUs, two CPU processes
    accelerate launch -q --multi_gpu --num_processes 8 trainer/train.py ...
    ACCELERATE_USE_CPU=true accelerate launch -q --multi_gpu --num_processes 2 trainer/train.py ...

The same command again resumes from the newest checkpoint in --run.dir, with any number of processes. With the same
number the losses equal those of an uninterrupted run: a step depends only on the weights, the optimizer's state, the
seed, and the position in the sequence of global batches (see `shards/order/epoch_order.py`). SIGTERM and SIGINT end the
run after the current step, with a checkpoint and exit status 143 or 130.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shards.commands.options import entries, sections
from shards.common.text import counted
from shards.storage.location import Location
from trainer.commands import command_line as command
from trainer.config.schedule import checkpoint_is_due, evaluation_is_due, fold, learning_rate, stage_of, total_steps
from trainer.config.settings import Config, ConfigError
from trainer.config.yaml_config import add_arguments, described, from_arguments, recipes
from trainer.run.distributed import TrainingError, from_main
from trainer.run.run_state import (
    Training,
    begin_stage,
    mask_warnings,
    norm_statistics,
    save_state,
    set_up,
    share_buffers,
)
from trainer.run.run_summary import run_summary
from trainer.run.run_writer import RunWriter
from trainer.run.step_report import PendingStep, exchange, loading, weighted_sum

if TYPE_CHECKING:  # torch takes seconds to import: not for --help or a wrong argument
    from torch import Tensor
    from torchvision.models.detection import MaskRCNN

    from shards.stream.replacements import BadSample
    from trainer.data.instances import Batch
    from trainer.run.device_batches import StepBatches
    from trainer.run.runlog import RunLog

log = logging.getLogger("trainer.commands.train")

USAGE = """\
{0} --config RECIPE --data.shards URL --run.dir FOLDER [options]
       {0} --config my.yaml [--section.key VALUE ...]
       {0} --help-all"""
BRIEF = (
    *("--config", "--resume", "--data.shards", "--run.dir", "--data.classes", "--data.batch_size", "--data.workers"),
    *("--model.backbone", "--model.weights", "--optim.lr", "--train.epochs", "--train.steps_per_epoch"),
    *("--train.layers", "--train.precision", "--train.compile", "--run.trackers", "--help-all"),
)


def epilog(program: str) -> str:
    """Return what `--help` says after the options."""
    return f"""\
recipes (`maskstream recipes NAME` prints one, to start your own from):
{described(recipes())}

examples:
  {program} --config traffic --data.shards s3://bucket/traffic --run.dir runs/traffic
  {program} --config traffic --data.shards shards-small --run.dir runs/small \\
      --data.batch_size 2 --train.steps_per_epoch 100 --train.epochs 10
  {program} --resume runs/traffic --data.shards s3://bucket/traffic --run.dir runs/longer --train.epochs 60

Values are YAML, such as [Person, Car]. --help-all describes all {len(entries(Config))} options, by section:
{", ".join(sections(Config))}."""


def main(arguments: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Run the command and return its exit status."""

    def action() -> None:
        train(parse(arguments, program))

    return command.run("train", action)


def parse(arguments: Sequence[str] | None, program: str = "train.py") -> Config:
    """Return the settings of the command line."""
    description = "Train Mask R-CNN on a shard dataset. The same command again resumes the run."
    parser = command.Parser(program, description, usage=USAGE.format(program), brief=BRIEF, epilog=epilog(program))
    add_arguments(parser)
    config = from_arguments(parser.parse_args(arguments))
    if not config.data.shards:
        raise ConfigError("data.shards is empty: give --data.shards, such as s3://bucket/prefix")
    return config


def train(config: Config) -> MaskRCNN:
    """Train until all epochs are done, from the newest checkpoint of `run.dir` if there is one, on all ranks.

    Returns:
        The network with the weights after the last step, which are the same on every rank.

    Raises:
        UserError: settings or data are wrong, storage fails, or losses are not finite.
        command.Stopped: a signal ended the run, which is saved.
    """
    command.start_logging()
    with RunWriter(Location(config.run.dir)) as writer:
        return train_as(writer, config)


def train_as(writer: RunWriter, config: Config) -> MaskRCNN:
    """Do what `train` does, as the writer of the run's folder."""
    t = set_up(config, writer)

    from shards.stream.loader import loader
    from trainer.report.batch_pictures import BatchPictures
    from trainer.run.device_batches import DeviceBatches
    from trainer.run.runlog import RunLog

    total = total_steps(config.train)
    record = RunLog(t.run, t.config, t.accelerator, t.step, total) if t.accelerator.is_main_process else None
    past = (record.last_evaluation, record.since_best, record.bad_samples) if record else None
    evaluated, since_best, t.bad_samples = from_main(past)
    if t.step >= total:
        log.info("the run in %s is finished (%s): raise train.epochs to continue it", t.run, counted(t.step, "step"))

    device = t.accelerator.device
    data = loader(t.stream, workers=config.data.workers, pin_memory=device.type == "cuda")
    batches, pending = DeviceBatches(data, device, config.train.accumulate), deque[PendingStep]()
    first = BatchPictures(t.run, t.dataset.categories, config.loss, t.step) if record else None
    with command.Signals() as signals:
        signal = 0  # that any rank received
        while True:
            # First in the loop: a resumed run repeats an evaluation that was interrupted.
            due = config.data.val_split and evaluation_is_due(config.train, t.step)
            if due and evaluated < t.step and not signal:
                evaluate_now(t, record)
                evaluated, since_best = t.step, from_main(record.since_best if record else 0)
            if t.step >= total or signal:
                break
            if 0 < config.train.patience <= since_best:
                evaluations = counted(since_best, "evaluation")
                log.info("%s without a better one: the run ends here (train.patience)", evaluations)
                break
            if t.stage != stage_of(config.train, t.step):
                begin_stage(t)
            if not pending:
                began = time.perf_counter()
            taken = batches.take()
            if first:
                first.add(taken.batches)
            pending.append(train_step(t, taken, signals))
            batches.prefetch()
            # A GPU computes this step while the host reads the result of the one before, unless this one is saved.
            is_saved = checkpoint_is_due(config.train, t.step)
            while len(pending) > (0 if device.type == "cpu" or is_saved or signal else 1):
                row, received = finish_step(t, pending.popleft())
                signal = signal or received
                began, seconds = time.perf_counter(), time.perf_counter() - began
                if record:
                    record.add_step(row, seconds)
            if is_saved or signal:
                share_buffers(t)
                if record:
                    writer.check()
                    record.flush(draw=t.step % config.train.steps_per_epoch == 0 or bool(signal))
                    save_state(t)

    end_run(t, record, signal)
    return t.network


def train_step(t: Training, taken: StepBatches, signals: command.Signals) -> PendingStep:
    """Do one step on all ranks, with `train.accumulate` batches of this rank.

    A step with a loss or gradient that is not finite changes nothing. The device decides that, on all ranks alike, and
    nothing waits for it: `finish_step` does.
    """
    from trainer.run.optim import apply_update, mark_nonfinite

    config, accelerator, batches = t.config, t.accelerator, taken.batches
    images = sum(len(batch) for batch in batches) * accelerator.num_processes
    rate = learning_rate(config.optim, config.train, t.step, images)
    for group in t.optimizer.param_groups:
        group["lr"] = rate
    statistics = norm_statistics(t.network)

    losses = forward_backward(t, batches)
    # The one exchange per step: every rank gets all losses and signals, so that all ranks do the same.
    gathered = exchange(accelerator, losses, taken.loaded, signals.number, len(taken.bad_samples))
    mark_nonfinite(t.model, gathered[:, : len(losses[0])])
    norm = accelerator.clip_grad_norm_(t.model.parameters(), config.optim.clip_norm or math.inf)
    is_done = norm.isfinite()
    apply_update(t.optimizer, is_done)
    t.optimizer.zero_grad()
    for buffer, before in statistics:
        buffer.copy_(buffer.where(is_done, before))
    if t.ema is not None:
        t.ema.update(t.network, is_done)
    t.step += 1
    row = {
        "step": t.step,
        "epoch": (t.step - 1) // config.train.steps_per_epoch + 1,
        "position": t.position,
        "data_epochs": t.position / t.stream.batches_per_epoch,
        "lr": rate,
        "images": images,
    }
    return PendingStep(gathered, norm, losses, [batch.image_ids for batch in batches], row, taken.bad_samples)


def finish_step(t: Training, pending: PendingStep) -> tuple[dict[str, Any], int]:
    """Wait for the result of a step; every rank calls this.

    Returns:
        The step's row of metrics.jsonl without its times, and the number of a signal that any rank received, or 0.

    Raises:
        TrainingError: a loss or the gradient is not finite, and no more steps may be skipped; on every rank alike.
        SampleError: more samples than `data.skip_bad` were damaged; on every rank alike.
    """
    result, row = pending.read(is_scaled=t.accelerator.scaler is not None), pending.row
    row |= {
        "loss": weighted_sum(result.losses, t.config.loss, row["step"]),
        "losses": result.losses,
        "grad_norm": result.grad_norm,
    }
    row |= loading(result.reports)
    account_for(t, result.bad_samples, row)
    if result.problem:
        most = t.config.train.skip_nonfinite
        if t.skipped >= most:
            raise TrainingError(f"step {row['step']}: {result.problem}: lower optim.lr, or look at the samples")
        t.skipped += 1
        row["skipped"] = result.problem
        log.warning("step %d is skipped (%d of %d): %s", row["step"], t.skipped, most, result.problem)
    return row, result.signal


def account_for(t: Training, replaced: Sequence[BadSample], row: dict[str, Any]) -> None:
    """Log the damaged samples that were replaced for a step, if the run has not met them before.

    SampleError if the run has met more than `data.skip_bad`.
    """
    from shards.stream.replacements import too_many

    most, known = t.config.data.skip_bad, len(t.bad_samples)
    for bad in replaced:
        if bad not in t.bad_samples:
            t.bad_samples.append(bad)
            if len(t.bad_samples) > most:
                raise too_many(t.bad_samples)
            log.warning("step %d: a sample is replaced (%d of %d): %s", row["step"], len(t.bad_samples), most, bad)
    if new := t.bad_samples[known:]:
        row["replaced"] = [asdict(bad) for bad in new]


def forward_backward(t: Training, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Add the gradients of this rank's batches, averaged over the ranks, and advance the position.

    Returns the losses of each batch by name, as scalars without a graph.
    """
    import torch

    world, found = t.accelerator.num_processes, []
    for number, batch in enumerate(batches, 1):
        # The random choices of a step (which RoIs train) belong to its batch: they do not depend on earlier batches.
        torch.manual_seed(fold(t.config.train.seed, t.position + t.accelerator.process_index))
        with nullcontext() if number == len(batches) else t.accelerator.no_sync(t.model):
            losses = t.model(batch, teacher=t.teacher)
            t.accelerator.backward(weighted_sum(losses, t.config.loss, t.step + 1))
        found.append({name: loss.detach() for name, loss in losses.items()})
        t.position += world
    return found


def end_run(t: Training, record: RunLog | None, signal: int) -> None:
    """End the trackers on all ranks; raise `command.Stopped` if a signal ended the run."""
    t.accelerator.wait_for_everyone()
    t.accelerator.end_training()
    if record:
        record.close()
        if not signal and record.steps.rows:
            write_model_card(t, record)
        if not signal:
            log.info("%s", run_summary(t.run, t.config.data, record.steps.rows, record.evaluations.rows))
    if signal:
        raise command.Stopped(
            signal,
            f"stopped by a signal after step {t.step}, which is saved in {t.run}: the same command resumes from there",
        )


def write_model_card(t: Training, record: RunLog) -> None:
    """Write `README.md` into the folder of a finished run."""
    from shards.format.dataset_card import README_FILE
    from trainer.report.model_card import model_card
    from trainer.run.runlog import environment

    index, categories = t.stream.order.indexes[0], t.dataset.categories
    warnings = mask_warnings(t.dataset.index(t.config.data.split), categories, t.config)
    rows, machine = (record.steps.rows, record.evaluations.rows), environment(t.accelerator)
    (t.run / README_FILE).write(model_card(t.config, t.dataset, len(index), *rows, machine, warnings).encode("utf-8"))


def evaluate_now(t: Training, record: RunLog | None) -> None:
    """Evaluate the current weights on all ranks; the main rank draws pictures and keeps the best weights."""
    from trainer.commands.evaluate import evaluate
    from trainer.report.pictures import Pictures
    from trainer.report.score_plots import draw_precision_recall
    from trainer.report.scorecard import summary

    split, data = t.config.data.val_split, t.config.data
    pictures = Pictures(t.dataset.categories, t.config.run.pictures if record else 0)
    result = evaluate(t.evaluated, t.dataset, split, t.accelerator, data, t.config.train, watch=pictures.add)
    if record and result:
        log.info("evaluation after step %d\n%s", t.step, summary(result))
        pictures.write(t.run, t.step)
        row = {"step": t.step, "split": split, **result.to_json()}
        if record.is_best(row):
            save_state(t, best=True)
        shown = {f"pictures/{image_id}": data for image_id, data in pictures.drawn.items()}
        if t.accelerator.trackers:
            shown[f"{split}/precision_recall"] = draw_precision_recall(result)
        # Last: a run that is killed before this evaluates these weights again.
        record.add_evaluation(row, shown)


if __name__ == "__main__":
    sys.exit(main())
