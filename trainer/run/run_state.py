"""The state of a training run: how it is set up or resumed, how a stage begins, and how it is saved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from shards.common.text import counted
from shards.storage.location import Location
from trainer.config.schedule import Stage, stage_of, stages
from trainer.config.settings import AUTO, Config, ConfigError, TrainConfig, validate
from trainer.run.distributed import TRAINING_TIMEOUT, checkpoint_to_resume, main_can_write, on_main, start_accelerator
from trainer.run.run_writer import RunWriter

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from torchvision.models.detection import MaskRCNN

    from shards.format.dataset import Category, Dataset
    from shards.format.index import Index
    from shards.stream.replacements import BadSample
    from shards.stream.streams import ShardStream
    from trainer.data.instances import Batch
    from trainer.run.optim import MovingAverage
    from trainer.step.trainable import Trainable

log = logging.getLogger("trainer.run.run_state")

FEW_MASKS = 50  # of a class; with fewer, its masks are hardly learnt
SHORTAGES = {"no mask": "never", "few masks": "hardly"}  # and how masks are learnt by default
SHOWN_CLASSES = 10  # in a warning


@dataclass
class Training:
    """The state of a training run on one rank."""

    config: Config
    run: Location
    dataset: Dataset
    accelerator: Accelerator
    stream: ShardStream[Batch]
    network: MaskRCNN
    step: int = 0  # steps done
    position: int = 0  # global batches consumed, by all ranks together
    skipped: int = 0  # steps that changed nothing because a loss was not finite
    bad_samples: list[BadSample] = field(default_factory=list)  # that were replaced, of all ranks
    stage: Stage | None = None
    model: Any = None  # the network as a function from a batch to its losses, wrapped by accelerate in `begin_stage`
    optimizer: Any = None
    ema: MovingAverage | None = None

    @property
    def evaluated(self) -> MaskRCNN:
        """The network that is evaluated and saved for inference: the averaged one if `train.ema` is on."""
        return self.ema.module if self.ema is not None else self.network

    @property
    def teacher(self) -> MaskRCNN | None:
        """The network whose masks teach those of objects without one of the source, if the settings ask for that."""
        return self.ema.module if self.ema is not None and self.config.has_teacher else None


def set_up(config: Config, writer: RunWriter | None = None) -> Training:
    """Create data, network and optimizer, in the state of the run's newest checkpoint, as the run's `writer`.

    UserError if settings or data are wrong, or storage fails; nothing is left in the run's folder then.
    """
    from shards.format.dataset import open_dataset  # not at the top: --help answers without pyarrow

    dataset = open_dataset(config.data.shards).select(classes=config.data.classes or None)
    run = Location(config.run.dir)
    if config.data.val_split and config.data.val_split not in dataset.splits:
        have = ", ".join(dataset.splits)
        raise ConfigError(f"data.val_split is {config.data.val_split!r}: the dataset has {have} ('' for no evaluation)")

    from trainer.model.checkpoint import check_same_run
    from trainer.run.optim import MovingAverage
    from trainer.step.trainable import VERSION

    accelerator = start_accelerator(config.train.precision, config.run.trackers, run, TRAINING_TIMEOUT)
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        # accelerate would silently train in float32.
        raise ConfigError("train.precision is fp16, which needs a GPU, and this process has none: use fp32 or bf16")
    check_compile(config.train, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = config.train.accumulate  # `backward` divides the losses by it
    main_can_write(run, "--run.dir", accelerator)
    if writer is not None:
        on_main(writer.claim, accelerator)
    resumed = checkpoint_to_resume(run, config.run.resume, accelerator)
    if config.data.batch_size == AUTO:
        found = resumed.config.data.batch_size if resumed else find_batch_size(config, dataset, accelerator)
        config = replace(config, data=replace(config.data, batch_size=found))
        validate(config)  # again, because some options need more than one image
    stream = open_stream(config, dataset, accelerator, start=resumed.position if resumed else 0)
    if len(dataset.categories) < len(dataset.info.categories):
        names = ", ".join(category.name for category in dataset.categories)
        log.info("training on %s: objects of the dataset's other classes are background", names)
    if accelerator.is_main_process:
        warn_of_few_masks(config, dataset)
    if resumed:
        check_same_run(resumed, config, stream.order.identity(), dataset.categories)

    t = Training(config, run, dataset, accelerator, stream, build_network(config, dataset))
    if resumed:
        t.network.load_state_dict(resumed.raw or resumed.weights)
        t.step, t.position, t.skipped = resumed.step, resumed.position, resumed.skipped
        if accelerator.scaler is not None and resumed.scaler is not None:
            accelerator.scaler.load_state_dict(resumed.scaler)
        log.info("continuing %s from step %d", run, resumed.step)
        if resumed.step_version != VERSION:
            log.warning("the checkpoint is of another release: from here on, other RoIs are drawn from the same seed")
    else:
        load_initial_weights(t)
    begin_stage(t, resumed.optimizer if resumed else None)
    if config.train.ema:
        t.ema = MovingAverage(t.network, config.train.ema, t.step - t.skipped)
        if resumed:
            t.ema.module.load_state_dict(resumed.weights)
            cache_norms(config.train, accelerator, t.ema.module)
    return t


def warn_of_few_masks(config: Config, dataset: Dataset) -> None:
    """Log the classes with no or few masks in the training split, and the settings with which they learn masks."""
    index = dataset.index(config.data.split)
    for warning in mask_warnings(index, dataset.categories, config):
        log.warning("data.split %s: %s", config.data.split, warning)
    short = short_of_masks(index, dataset.categories, config)
    if any(not is_predicted for _, is_predicted in short) and (advice := masks_from_boxes(config)):
        log.warning("%s", advice)


def mask_warnings(index: Index, categories: Sequence[Category], config: Config) -> list[str]:
    """Return a warning about the classes without a mask in a split, and one about those with few, if there are any.

    Classes with predicted masks that training uses have warnings of their own.
    """
    short = short_of_masks(index, categories, config)
    is_short = {category.id for found in short.values() for category in found}
    objects, masks = _alone(index, categories), index.counts("masks", categories)
    enough = any(masks[category.id] for category in categories if category.id not in is_short)
    warnings = []
    for (what, is_predicted), found in sorted(short.items(), reverse=True):
        ways = {
            "from predicted masks": is_predicted,
            "from boxes": config.loss.unmasked == "masks",
            "from the other classes": config.model.mask_head == "agnostic" and enough,
        }
        learnt = " and ".join(way for way, is_on in ways.items() if is_on) or SHORTAGES[what]
        names = [f"{one.name} ({masks[one.id]} of {counted(objects[one.id], 'object')})" for one in found]
        warnings.append(f"{what}: {_some(names)}: boxes and classes are learnt, masks {learnt}")
    return warnings


def short_of_masks(
    index: Index, categories: Sequence[Category], config: Config
) -> dict[tuple[str, bool], list[Category]]:
    """Return the classes of a split by the name of their shortage, and whether training uses predicted masks of them.

    The names are those of `SHORTAGES`.
    """
    objects, masks = _alone(index, categories), index.counts("masks", categories)
    predicted = index.counts("predicted", categories)
    short: dict[tuple[str, bool], list[Category]] = {}
    for category in categories:
        if (count := masks[category.id]) < min(FEW_MASKS, objects[category.id]):
            is_predicted = config.loss.predicted > 0 and predicted[category.id] > 0
            short.setdefault(("few masks" if count else "no mask", is_predicted), []).append(category)
    return short


def _alone(index: Index, categories: Sequence[Category]) -> dict[int, int]:
    """Return for each category id the number of its objects, without group-of regions."""
    objects, groups = index.counts("instances", categories), index.counts("groups", categories)
    return {number: objects[number] - groups[number] for number in objects}


def masks_from_boxes(config: Config) -> str:
    """Return the settings with which classes with no or few masks learn them, as a sentence; "" if they are on."""
    is_on = {
        "--model.mask_head agnostic": config.model.mask_head == "agnostic",
        "--loss.unmasked masks": config.loss.unmasked == "masks",
    }
    off = " ".join(option for option in is_on if not is_on[option])
    effect = "such classes learn masks from boxes and from the other classes with"
    return off and f"{effect} {off} (recipe few-masks), then with maskstream fill: docs/masks-from-boxes.md"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    return ", ".join(names[:SHOWN_CLASSES]) + more


def check_compile(train: TrainConfig, processes: int) -> None:
    """Raise a ConfigError for CUDA graphs with several processes or accumulation, which torch does not support."""
    if train.compile in ("reduce-overhead", "max-autotune") and (processes > 1 or train.accumulate > 1):
        raise ConfigError(
            f"train.compile is {train.compile}, whose CUDA graphs need one process and train.accumulate 1, not "
            f"{counted(processes, 'process', 'processes')} and {train.accumulate}: use default"
        )


def open_stream(config: Config, dataset: Dataset, accelerator: Accelerator, start: int) -> ShardStream[Batch]:
    """Return this rank's stream of training batches, from global batch `start` on."""
    from shards.stream.streams import ShardStream
    from trainer.data.collate import TrainCollate, sample_cache
    from trainer.model.build import num_classes

    data = config.data
    return ShardStream(
        dataset.select(fraction=data.fraction),
        data.split,
        batch_size=data.batch_size,
        seed=config.train.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start=start,
        lanes=data.lanes,
        window=data.window,
        group_by_aspect=data.group_by_aspect,
        repeat_threshold=data.repeat_threshold,
        read_ahead=data.read_ahead_mb * 2**20,
        cache=sample_cache(data),
        stall_s=data.stall_s,
        skip_bad=data.skip_bad,
        collate=TrainCollate(
            data, config.train.seed, num_classes(dataset.categories), predictions=config.loss.predicted > 0
        ),
    )


def find_batch_size(config: Config, dataset: Dataset, accelerator: Accelerator) -> int:
    """Return the number for `data.batch_size` auto in a new run; see `largest_batch`."""
    from trainer.model.build import num_classes
    from trainer.run.fit_batch import largest_batch

    network = build_network(config, dataset)
    cache_norms(config.train, accelerator, network)
    return largest_batch(config, network, num_classes(dataset.categories), accelerator)


def build_network(config: Config, dataset: Dataset) -> MaskRCNN:
    """Return the network with the random weights of `train.seed`."""
    import torch

    from trainer.model.backbones import checkpoint_activations
    from trainer.model.build import build_model, num_classes

    torch.manual_seed(config.train.seed)
    network = build_model(config.model, config.data, num_classes(dataset.categories))
    if config.train.checkpoint_activations:
        checkpoint_activations(network)
    if config.train.channels_last:
        network.to(memory_format=torch.channels_last)
    return network


def load_initial_weights(t: Training) -> None:
    """Load the weights that `model.weights` names; UserError if they leave a layer random that is never trained."""
    from trainer.model.freeze import check_all_learned, trainable_parameters
    from trainer.model.weights import load_weights

    report = load_weights(t.network, t.config.model, t.dataset.categories)
    trained = {name for stage in stages(t.config.train) for name in trainable_parameters(t.network, stage.layers)}
    check_all_learned(t.network, report.missing, trained)
    log.info("%s", report)


def begin_stage(t: Training, optimizer: dict[str, Any] | None = None) -> None:
    """Make the layers of the stage at `t.step` trainable, with a new optimizer.

    The network is wrapped again: DDP reduces only the gradients of the parameters that were trainable when it was
    created. Wrapping also gives every rank the main rank's weights. The optimizer's state is used if the run resumes
    inside the stage.
    """
    from trainer.model.freeze import set_trainable
    from trainer.run.optim import load_state, make_optimizer

    t.stage = stage_of(t.config.train, t.step)
    t.model = t.optimizer = None
    t.accelerator.free_memory()
    names = set_trainable(t.network, t.stage.layers)
    log.info(
        "stage %d of %d: %s (training: %s)", t.stage.number, t.stage.of, t.stage.layers, counted(len(names), "tensor")
    )
    model = make_step(t)
    # Not the loader: the stream already reads this rank's share only, and accelerate would split it again.
    t.model, t.optimizer = t.accelerator.prepare(model, make_optimizer(model, t.config.optim))
    if optimizer is not None and t.step > t.stage.start:
        load_state(t.optimizer, optimizer)  # momentum, weight decay and the like come from the current settings


def make_step(t: Training) -> Trainable:
    """Return the network as a function from a batch to its losses, on its device; compiled with `train.compile`."""
    from trainer.model.build import num_classes
    from trainer.run.optim import frozen_copy
    from trainer.step.trainable import Trainable
    from trainer.step.warm_up import warm_up

    train, device = t.config.train, t.accelerator.device
    step = Trainable(t.network, t.config.loss, mask_rois=t.config.model.mask_rois).train().to(device)
    cache_norms(train, t.accelerator, t.network)
    if train.compile != "no":
        step.compile_parts(mode=train.compile)
        with t.accelerator.autocast():
            teacher = frozen_copy(t.network) if t.config.has_teacher else None
            warm_up(step, t.config.data, num_classes(t.dataset.categories), device, teacher)
    return step


def cache_norms(train: TrainConfig, accelerator: Accelerator, network: MaskRCNN) -> None:
    """Let the frozen norms of a network compute scale and shift once, in the precision of `train.frozen_norms`."""
    import torch

    from trainer.model.backbones import cache_frozen_norms

    reduced = {"bf16": torch.bfloat16, "fp16": torch.float16} if train.frozen_norms == "autocast" else {}
    cache_frozen_norms(network, reduced.get(accelerator.mixed_precision, torch.float32))


def norm_statistics(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the running statistics that a forward pass changes, each with a copy of its values."""
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]


def share_buffers(t: Training) -> None:
    """Copy the main rank's buffers to every rank: the batch norms of each have seen different batches."""
    from accelerate.utils import broadcast

    for network in [t.network] if t.ema is None else [t.network, t.ema.module]:
        for buffer in network.buffers():
            broadcast(buffer)


def save_state(t: Training, *, best: bool = False) -> None:
    """Write a checkpoint, or only the weights as the run's best; only the main rank calls this."""
    from trainer.model.checkpoint import BEST, FOLDER, State, save
    from trainer.step.trainable import VERSION

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
        VERSION,
    )
    save(t.run, state, 1 if best else t.config.train.keep_checkpoints, BEST if best else FOLDER)
