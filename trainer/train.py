"""Train Mask R-CNN on a shard dataset, streaming.

    accelerate launch trainer/train.py --config configs/traffic.yaml --data.shards s3://bucket/prefix --run.dir runs/one

    # all GPUs of a machine; or, without GPUs, two CPU processes
    accelerate launch --multi_gpu --num_processes 8 trainer/train.py ...
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 trainer/train.py ...

The same command again continues from the newest checkpoint in --run.dir, with any number of processes. With the same
number the losses are those of an unbroken run: a step depends on nothing but the weights, the optimizer's state, the
seed, and the position G in the row of global batches (see `shards/order.py`).
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shards.dataset import Dataset, open_dataset
from shards.storage import Location
from trainer import command
from trainer.config import Config, ConfigError, add_arguments, from_arguments
from trainer.ranks import TrainingError, from_main, mean_losses, newest_checkpoint, share_buffers, start_accelerator
from trainer.schedule import checkpoint_is_due, evaluation_is_due, fold, learning_rate, total_steps

if TYPE_CHECKING:  # torch takes seconds to import: not for --help or a wrong argument
    from accelerate import Accelerator
    from torchvision.models.detection import MaskRCNN

    from shards.stream import ShardStream
    from trainer.instances import Batch

log = logging.getLogger("trainer.train")


@dataclass
class Training:
    """A run under way, on one rank."""

    config: Config
    run: Location
    dataset: Dataset
    accelerator: Accelerator
    stream: ShardStream[Batch]
    network: MaskRCNN  # what is evaluated and saved
    model: Any  # the network as a function from a batch to its losses, wrapped by accelerate: what is trained
    optimizer: Any
    step: int  # steps done
    position: int  # global batches consumed, by all ranks together


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
    """Train until `train.epochs` are done, from the newest checkpoint of `run.dir` if there is one.

    Every rank calls this, and gets the same weights back.

    Raises:
        UserError: settings or data are wrong, storage fails, or a loss is not finite.
    """
    command.start_logging()
    t = set_up(config)

    from shards.loader import loader
    from trainer.evaluate import evaluate, summary
    from trainer.runlog import Progress, RunLog, environment, reading

    device, is_main, total = t.accelerator.device, t.accelerator.is_main_process, total_steps(config.train)
    record = RunLog(t.run, config, environment(t.accelerator), t.step) if is_main else None
    evaluated = from_main(record.evaluations.rows[-1]["step"] if record and record.evaluations.rows else 0)
    progress = Progress(config.run.log_steps, total)
    if t.step >= total:
        log.info("the run in %s is finished (%d steps): raise train.epochs to go on", t.run, t.step)

    data = loader(t.stream, workers=config.data.workers, pin_memory=device.type == "cuda")
    batches = iter(data)
    while True:
        # First in the loop: an evaluation that was cut short is made up for when the run continues.
        if config.data.val_split and evaluated < t.step and evaluation_is_due(config.train, t.step):
            result = evaluate(t.network, t.dataset, config.data.val_split, t.accelerator, config.data, config.train)
            evaluated = t.step
            if record and result:
                log.info("evaluation after step %d\n%s", t.step, summary(result))
                record.evaluations.append({"step": t.step, "split": config.data.val_split, **result.to_json()})
                record.flush()
        if t.step >= total:
            break

        began, before = time.perf_counter(), data.statistics
        batch = next(batches)
        row = train_step(t, batch, waited=time.perf_counter() - began)
        seconds = time.perf_counter() - began
        row |= {"seconds": seconds, "images_per_s": row["images"] / seconds, "data_wait": row["data_wait_s"] / seconds}
        row |= reading(data.statistics.since(before))
        if record:
            record.steps.append(row)
            progress.add(row)
        if checkpoint_is_due(config.train, t.step):
            share_buffers(t.network)
            if record:
                record.flush()
                save_state(t)

    if record:
        record.close()
    t.accelerator.wait_for_everyone()
    t.accelerator.end_training()
    return t.network


def set_up(config: Config) -> Training:
    """Data, network and optimizer, where the run's newest checkpoint left them.

    Raises:
        UserError: as `train`; before anything is written.
    """
    dataset, run = open_dataset(config.data.shards).select(classes=config.data.classes), Location(config.run.dir)
    if config.data.val_split and config.data.val_split not in dataset.splits:
        have = ", ".join(dataset.splits)
        raise ConfigError(f"data.val_split is {config.data.val_split!r}: the dataset has {have} ('' for no evaluation)")

    import torch

    from shards.stream import ShardStream
    from trainer.checkpoint import check_same_run
    from trainer.data import TrainCollate, sample_cache
    from trainer.freeze import check_all_learned, set_trainable
    from trainer.heads import Trainable
    from trainer.model import build_model, num_classes
    from trainer.weights import load_weights

    accelerator = start_accelerator()
    resumed = newest_checkpoint(run, accelerator)
    stream = ShardStream(
        dataset.select(classes=config.data.classes, fraction=config.data.fraction),
        config.data.split,
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start=resumed.position if resumed else 0,
        lanes=config.data.lanes,
        window=config.data.window,
        group_by_aspect=config.data.group_by_aspect,
        repeat_threshold=config.data.repeat_threshold,
        read_ahead=config.data.read_ahead_mb * 2**20,
        cache=sample_cache(config.data),
        stall_s=config.data.stall_s,
        collate=TrainCollate(config.data, config.train.seed),
    )
    if len(dataset.categories) < len(dataset.info.categories):
        names = ", ".join(category.name for category in dataset.categories)
        log.info("training on %s: objects of the dataset's other classes are background", names)
    if resumed:
        check_same_run(resumed, config, stream.order.identity(), dataset.categories)

    torch.manual_seed(config.train.seed)
    network = build_model(config.model, config.data, num_classes(dataset.categories))
    trained = set_trainable(network, config.train.layers)
    if resumed:
        network.load_state_dict(resumed.weights)
        log.info("continuing %s from step %d", run, resumed.step)
    else:
        report = load_weights(network, config.model, dataset.categories)
        check_all_learned(network, report.missing, trained)
        log.info("%s", report)
    model: Any = Trainable(network, config.loss).train()
    optimizer: Any = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.optim.lr,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
    )
    # Never the loader: the stream has shared itself out already, and would be split a second time.
    model, optimizer = accelerator.prepare(model, optimizer)
    if resumed and resumed.optimizer:
        optimizer.load_state_dict(resumed.optimizer)
    step, position = (resumed.step, resumed.position) if resumed else (0, 0)
    return Training(config, run, dataset, accelerator, stream, network, model, optimizer, step, position)


def train_step(t: Training, batch: Batch, waited: float) -> dict[str, Any]:
    """One step of all ranks.

    Args:
        t: moved on by one step.
        batch: of this rank.
        waited: seconds that this rank waited for it.

    Returns:
        The step's row in metrics.jsonl but for its times: losses averaged over the ranks, the longest wait.

    Raises:
        TrainingError: a loss or the gradient is not finite; on every rank alike.
    """
    import torch

    config, accelerator = t.config, t.accelerator
    world, rate = accelerator.num_processes, learning_rate(config.optim, t.step)
    # What is random in a step (which RoIs train) belongs to its batch: nothing that came before plays a part.
    torch.manual_seed(fold(config.train.seed, t.position + accelerator.process_index))
    for group in t.optimizer.param_groups:
        group["lr"] = rate

    losses = t.model(batch.to(accelerator.device))
    values = torch.stack([loss.detach().float() for loss in losses.values()])
    # One exchange a step tells every rank all losses, so that all stop if one is not finite, and the longest wait.
    table = accelerator.gather(torch.cat((values, values.new_tensor([waited])))[None]).tolist()
    means = mean_losses(t.step + 1, list(losses), table, batch.image_ids)
    accelerator.backward(sum(losses.values()))
    norm = float(accelerator.clip_grad_norm_(t.model.parameters(), config.optim.clip_norm or math.inf))
    if not math.isfinite(norm) and accelerator.scaler is None:  # fp16's scaler skips such a step by itself
        raise TrainingError(f"step {t.step + 1}: the gradient is {norm}, though every loss is finite: lower optim.lr")
    t.optimizer.step()
    t.optimizer.zero_grad()
    t.step, t.position = t.step + 1, t.position + world
    return {
        "step": t.step,
        "epoch": (t.step - 1) // config.train.steps_per_epoch + 1,
        "position": t.position,
        "data_epochs": t.position / t.stream.batches_per_epoch,
        "loss": sum(means.values()),
        "losses": means,
        "lr": rate,
        "grad_norm": norm if math.isfinite(norm) else None,
        "images": len(batch) * world,
        "data_wait_s": max(row[-1] for row in table),
    }


def save_state(t: Training) -> None:
    """Write a checkpoint; the main rank's work."""
    from trainer.checkpoint import State, save

    order, weights, optimizer = t.stream.order.identity(), t.network.state_dict(), t.optimizer.state_dict()
    state = State(t.step, t.position, order, t.dataset.categories, t.config, weights, optimizer)
    save(t.run, state, t.config.train.keep_checkpoints)


if __name__ == "__main__":
    sys.exit(main())
