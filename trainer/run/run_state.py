"""A run under way: what it holds, how it begins and goes on, how a stage begins, and how it is saved."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shards.common.text import counted
from shards.format.dataset import Dataset, open_dataset
from shards.storage.location import Location
from trainer.config.schedule import Stage, stage_of, stages
from trainer.config.settings import Config, ConfigError
from trainer.run.distributed import PATIENCE_IN_TRAINING, checkpoint_to_resume, main_can_write, start_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.optim.swa_utils import AveragedModel
    from torchvision.models.detection import MaskRCNN

    from shards.stream.streams import ShardStream
    from trainer.data.instances import Batch

log = logging.getLogger("trainer.run.run_state")


@dataclass
class Training:
    """A run under way, on one rank."""

    config: Config
    run: Location
    dataset: Dataset
    accelerator: Accelerator
    stream: ShardStream[Batch]
    network: MaskRCNN  # what learns
    step: int = 0  # steps done
    position: int = 0  # global batches consumed, by all ranks together
    skipped: int = 0  # of the steps: those that changed nothing, because a loss was not finite
    stage: Stage | None = None
    model: Any = None  # the network as a function from a batch to its losses, wrapped by accelerate: see `begin_stage`
    optimizer: Any = None
    ema: AveragedModel | None = None

    @property
    def evaluated(self) -> MaskRCNN:
        """What is evaluated, and what a checkpoint holds for inference: the averaged network where there is one."""
        return self.ema.module if self.ema is not None else self.network


def set_up(config: Config) -> Training:
    """Data, network and optimizer, where the run's newest checkpoint left them.

    Raises:
        UserError: as `train`; before anything is written that stays.
    """
    dataset = open_dataset(config.data.shards).select(classes=config.data.classes or None)
    run = Location(config.run.dir)
    if config.data.val_split and config.data.val_split not in dataset.splits:
        have = ", ".join(dataset.splits)
        raise ConfigError(f"data.val_split is {config.data.val_split!r}: the dataset has {have} ('' for no evaluation)")

    import torch

    from shards.stream.streams import ShardStream
    from trainer.data.collate import TrainCollate, sample_cache
    from trainer.model.build import build_model, num_classes
    from trainer.model.checkpoint import check_same_run
    from trainer.model.freeze import check_all_learned, trainable_parameters
    from trainer.model.weights import load_weights
    from trainer.run.optim import averaged

    accelerator = start_accelerator(config.train.precision, config.run.trackers, run, PATIENCE_IN_TRAINING)
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        # accelerate would train in float32 without a word.
        raise ConfigError("train.precision is fp16, which needs a GPU, and this process has none: take fp32 or bf16")
    accelerator.gradient_accumulation_steps = config.train.accumulate  # what `backward` divides by
    main_can_write(run, "--run.dir", accelerator)
    resumed = checkpoint_to_resume(run, config.run.resume, accelerator)
    stream = ShardStream(
        dataset.select(fraction=config.data.fraction),
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
    if config.train.channels_last:
        network.to(memory_format=torch.channels_last)
    if config.train.compile:
        network.backbone.compile()
    t = Training(config, run, dataset, accelerator, stream, network)
    if resumed:
        network.load_state_dict(resumed.raw or resumed.weights)
        t.step, t.position, t.skipped = resumed.step, resumed.position, resumed.skipped
        if accelerator.scaler is not None and resumed.scaler is not None:
            accelerator.scaler.load_state_dict(resumed.scaler)
        log.info("continuing %s from step %d", run, resumed.step)
    else:
        report = load_weights(network, config.model, dataset.categories)
        trained = {name for stage in stages(config.train) for name in trainable_parameters(network, stage.layers)}
        check_all_learned(network, report.missing, trained)
        log.info("%s", report)
    begin_stage(t, resumed.optimizer if resumed else None)
    if config.train.ema:
        t.ema = averaged(network, config.train.ema, t.step - t.skipped)
        if resumed:
            t.ema.module.load_state_dict(resumed.weights)
    return t


def begin_stage(t: Training, optimizer: dict[str, Any] | None = None) -> None:
    """Let the layers of the stage at `t.step` train, with a new optimizer.

    The network is wrapped anew: DDP keeps to the parameters that trained when it saw them first. It also gives every
    rank the main rank's weights.

    Args:
        t: moved on into the stage.
        optimizer: the state of the optimizer, where the run continues inside the stage.
    """
    from trainer.model.freeze import set_trainable
    from trainer.model.losses import Trainable
    from trainer.run.optim import make_optimizer

    t.stage = stage_of(t.config.train, t.step)
    t.model = t.optimizer = None
    t.accelerator.free_memory()
    names = set_trainable(t.network, t.stage.layers)
    log.info(
        "stage %d of %d: %s (training: %s)", t.stage.number, t.stage.of, t.stage.layers, counted(len(names), "tensor")
    )
    model = Trainable(t.network, t.config.loss).train()
    # Never the loader: the stream has shared itself out already, and would be split a second time.
    t.model, t.optimizer = t.accelerator.prepare(model, make_optimizer(model, t.config.optim))
    if optimizer is not None and t.step > t.stage.start:
        # Of what was saved the state alone: momentum, decay and the like are as the settings now say.
        groups = t.optimizer.state_dict()["param_groups"]
        t.optimizer.load_state_dict({"state": optimizer["state"], "param_groups": groups})


def norm_statistics(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The running statistics that a forward pass changes, each with a copy of its values."""
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]


def share_buffers(t: Training) -> None:
    """Give every rank the main rank's buffers, in place.

    DDP does so before a forward pass; after it, each rank's batch norm has counted a batch of its own.
    """
    from accelerate.utils import broadcast

    for network in [t.network] if t.ema is None else [t.network, t.ema.module]:
        for buffer in network.buffers():
            broadcast(buffer)


def save_state(t: Training, *, best: bool = False) -> None:
    """Write a checkpoint; the main rank's work.

    Args:
        t: is left as it was.
        best: as the run's best weights, without what training needs to go on.
    """
    from trainer.model.checkpoint import BEST, FOLDER, State, save

    state = State(
        t.step,
        t.position,
        t.stream.order.identity(),
        t.dataset.categories,
        t.config,
        t.evaluated.state_dict(),
        None if best else t.optimizer.state_dict(),
        None if best or t.ema is None else t.network.state_dict(),
        t.skipped,
        None if best or t.accelerator.scaler is None else t.accelerator.scaler.state_dict(),
    )
    save(t.run, state, 1 if best else t.config.train.keep_checkpoints, BEST if best else FOLDER)
