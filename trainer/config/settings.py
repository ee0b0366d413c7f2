"""What can be set: a dataclass a section, with a default and a line of help for every option. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from shards.commands.options import ConfigError as ConfigError
from shards.commands.options import check, check_range, option
from shards.common.text import counted
from trainer.config.layer_names import parse_layers


@dataclass
class DataConfig:
    """Which samples, how many at once, how large, and how they are varied."""

    shards: str = option("", "root of the shard dataset: s3://bucket/prefix, a local path, any fsspec URL")
    split: str = option("train", "split to train on")
    val_split: str = option("val", "split that is evaluated at the end of an epoch; empty for none")
    classes: list[str] = option(
        [], "classes to train and evaluate on, by name, MID or id, as if the others had no label; empty for all"
    )
    fraction: float = option(
        1.0, "share of the training split to train on, above 0 to 1; chosen by a hash of ImageID", low=0, high=1
    )
    repeat_threshold: float = option(
        0.0,
        "t of LVIS's repeat factors: classes in a smaller share of the images come more often; 0: none",
        low=0,
        high=1,
    )
    batch_size: int = option(8, "images a batch on each GPU", low=1)
    workers: int = option(2, "loader processes of each GPU; 0 loads in the training process", low=0)
    lanes: int = option(8, "independent readings of the epoch; best a multiple of GPUs x workers", low=1)
    window: int = option(128, "samples of a lane that are shuffled together", low=1)
    group_by_aspect: bool = option(False, "put portrait and landscape images into batches of their own")
    read_ahead_mb: int = option(128, "bytes in MB that each loader process may hold ahead of need", low=1)
    cache_dir: str = option("", "folder on a local disk that keeps samples for the next epoch; empty for none")
    cache_mb: int = option(65536, "bytes in MB that the cache of a machine may take, all its processes together", low=1)
    stall_s: int = option(30, "a wait of so many seconds for storage is told, with what is waited for", low=1)
    resize: Literal["square", "shortest", "scale_jitter"] = option(
        "square",
        "square: pad to max_size x max_size; shortest: pad to the largest image of the batch; "
        "scale_jitter: scale by chance (scale_range), then cut or pad to max_size x max_size",
    )
    min_size: int = option(800, "the image's shorter side after scaling, in pixels, unless max_size forbids it", low=1)
    max_size: int = option(1024, "limit of the image's longer side after scaling, in pixels", low=1)
    min_sizes: list[int] = option([], "shorter sides that training chooses from; empty for min_size alone", low=1)
    scale_range: list[float] = option([0.1, 2.0], "scale_jitter: smallest and largest scale; 1 fits max_size", low=0.01)
    flip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    max_instances: int = option(
        100,
        "objects an image to learn from; of more, others each epoch are ignored, not background; 0: no limit",
        low=0,
    )
    photometric: float = option(0.0, "probability of each change: brightness, contrast, saturation, hue", low=0, high=1)
    copy_paste: float = option(
        0.0, "probability that an image has objects of the next one in its batch pasted over it", low=0, high=1
    )


@dataclass
class ModelConfig:
    """torchvision's Mask R-CNN: backbone, widths, sampling and detection."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v3_large"] = option(
        "resnet50", "the network under the FPN: a ResNet, or a MobileNet for small machines"
    )
    version: Literal["v1", "v2"] = option(
        "v1", "torchvision's first detector, or its v2: norms in FPN and heads, deeper RPN and box head"
    )
    norm: Literal["frozen", "batch", "group"] = option(
        "frozen", "the backbone's norm: frozen statistics, batch or group norm (v2's heads: batch unless group)"
    )
    norm_eps: float = option(1e-5, "what norms add to the variance; weights made with another are converted", low=1e-12)
    weights: str = option(
        "imagenet",
        "start: none, imagenet (backbone), coco (resnet50), a run folder, or path or URL of a state dict",
    )
    fpn_channels: int = option(256, "channels of every FPN level", low=1)
    box_head_features: int = option(1024, "width of the box head's two layers", low=1)
    mask_head_channels: list[int] = option([256, 256, 256, 256], "width of each convolution of the mask head", low=1)
    anchor_sizes: list[int] = option([32, 64, 128, 256, 512], "anchor side of each FPN level, in pixels", low=1)
    anchor_ratios: list[float] = option([0.5, 1.0, 2.0], "anchor height over width", low=0.01)
    rpn_pre_nms: list[int] = option([2000, 1000], "proposals kept before NMS: training, inference", low=1)
    rpn_post_nms: list[int] = option([2000, 1000], "proposals kept after NMS: training, inference", low=1)
    rois_per_image: int = option(512, "RoIs an image that the box head trains on", low=1)
    positive_fraction: float = option(0.25, "share of those RoIs that may be positive", low=0, high=1)
    score_threshold: float = option(0.05, "detections below this score are dropped", low=0, high=1)
    nms_threshold: float = option(
        0.5, "detections of a class that overlap a better one by more IoU are dropped", low=0, high=1
    )
    detections_per_image: int = option(100, "detections kept of an image", low=1)


@dataclass
class LossConfig:
    """What each of the five losses counts in their sum, and what incomplete annotations teach."""

    objectness: float = option(1.0, "weight of the RPN's object or background loss", low=0)
    rpn_box_reg: float = option(1.0, "weight of the RPN's box loss", low=0)
    classifier: float = option(1.0, "weight of the class loss", low=0)
    box_reg: float = option(1.0, "weight of the box loss", low=0)
    mask: float = option(1.0, "weight of the mask loss", low=0)
    unmasked: Literal["box", "background"] = option(
        "box", "an object without a mask teaches class and box, or is dropped and so background"
    )
    group_of: Literal["ignore", "object", "background"] = option(
        "ignore",
        "a group-of box is a region where nothing is taught that matches no object, or an object, or background",
    )
    unverified: Literal["ignore", "absent"] = option(
        "ignore",
        "where nothing is drawn, background may be a class that is not verified, or the class is taught as absent",
    )


@dataclass
class OptimConfig:
    """The optimizer and its rate: a linear warm-up in each stage, then steps or a cosine over the whole run."""

    optimizer: Literal["sgd", "adamw"] = option("sgd", "sgd with momentum, or adamw")
    lr: float = option(0.001, "learning rate after the warm-up", low=0)
    base_batch: int = option(
        0, "images a step that lr is meant for: the rate grows with the real number (all GPUs); 0: as given", low=0
    )
    momentum: float = option(0.9, "momentum of sgd", low=0, high=1)
    betas: list[float] = option([0.9, 0.999], "decay of adamw's two moments, below 1", low=0, high=0.999999)
    weight_decay: float = option(1e-4, "weight decay", low=0)
    decay_norms: bool = option(True, "whether normalisation layers and biases decay as well")
    clip_norm: float = option(5.0, "largest norm of the whole gradient; 0 for no clipping", low=0)
    warmup_steps: int = option(100, "steps over which the rate rises linearly from a thousandth", low=0)
    schedule: Literal["step", "cosine"] = option("step", "after the warm-up: step down at milestones, or a cosine")
    milestones: list[int] = option([], "step: steps of the run at which the rate is multiplied by gamma", low=0)
    gamma: float = option(0.1, "step: factor at each milestone", low=0)
    final_lr: float = option(0.0, "cosine: rate at the end of the run, as a share of lr", low=0, high=1)


@dataclass
class StageConfig:
    """One entry of `train.stages`."""

    layers: str = option("all", "as train.layers")
    epochs: int = option(1, "epochs of this stage", low=1)
    lr: float = option(1.0, "factor on optim.lr", low=0)


@dataclass
class TrainConfig:
    """How long, what trains, how, and how often it is saved and evaluated."""

    epochs: int = option(10, "epochs of a run without stages; each is steps_per_epoch steps", low=1)
    steps_per_epoch: int = option(100, "steps an epoch, however large the dataset", low=1)
    layers: str = option(
        "3+", "what trains in a run without stages: heads, 5+ to 2+ (the backbone from that stage on), all, or last 10%"
    )
    stages: list[StageConfig] = option(
        [], "one after the other, such as [{layers: heads, epochs: 2}, {layers: all, lr: 0.1}]"
    )
    accumulate: int = option(1, "batches of each GPU that make one step", low=1)
    ema: float = option(
        0.0, "decay of the averaged weights that are evaluated and saved, such as 0.999; 0: none", low=0, high=1
    )
    precision: Literal["launcher", "fp32", "bf16", "fp16"] = option(
        "launcher", "arithmetic of the network in training; launcher: as accelerate's --mixed_precision says"
    )
    channels_last: bool = option(False, "keep the weights of convolutions in channels-last order")
    compile: bool = option(False, "compile backbone and FPN with torch.compile")
    skip_nonfinite: int = option(0, "steps with a loss or gradient that is not finite to skip before giving up", low=0)
    checkpoint_steps: int = option(100, "a checkpoint every so many steps, and at the end of an epoch", low=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", low=1)
    eval_epochs: int = option(1, "evaluate every so many epochs, and after the last", low=1)
    eval_batch_size: int = option(4, "images a batch on each GPU in evaluation", low=1)
    seed: int = option(0, "seed of the order, the augmentation, the initial weights and the RoI sampling")


@dataclass
class RunConfig:
    """Where the run writes, and what it shows."""

    dir: str = option("runs/default", "run folder: a local path or any fsspec URL")
    resume: str = option(
        "", "last: go on from the newest checkpoint of run.dir, which must be there; or a checkpoint's path or URL"
    )
    log_steps: int = option(10, "a line of progress every so many steps (every step is in metrics.jsonl)", low=1)
    pictures: int = option(4, "images drawn at each evaluation, ground truth beside predictions", low=0)
    trackers: list[str] = option(
        ["tensorboard"], "where accelerate reports to, by its names, such as [wandb]; [] for none"
    )


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values a section, as the YAML file holds them."""
        return dataclasses.asdict(self)


def validate(config: Config) -> None:
    """Check what types cannot say.

    Raises:
        ConfigError: a value out of its range, or one that contradicts another.
    """
    check(config)
    for number, stage in enumerate(config.train.stages):
        for item in fields(stage):
            check_range(f"train.stages[{number}].{item.name}", getattr(stage, item.name), item)
        parse_layers(stage.layers)
    parse_layers(config.train.layers)
    if config.data.copy_paste and config.data.batch_size < 2:
        raise ConfigError(
            "data.copy_paste takes objects from another image of the batch: data.batch_size must be over 1"
        )
    if any(size > config.data.max_size for size in config.data.min_sizes):
        raise ConfigError(
            f"data.min_sizes {config.data.min_sizes} are not all within data.max_size {config.data.max_size}"
        )
    if config.data.min_size > config.data.max_size:
        raise ConfigError(f"data.min_size {config.data.min_size} is above data.max_size {config.data.max_size}")
    if len(config.model.anchor_sizes) != 5:
        raise ConfigError(
            f"model.anchor_sizes has {counted(len(config.model.anchor_sizes), 'value')}: the FPN has 5 levels"
        )
    for name, value in (
        ("model.rpn_pre_nms", config.model.rpn_pre_nms),
        ("model.rpn_post_nms", config.model.rpn_post_nms),
        ("data.scale_range", config.data.scale_range),
        ("optim.betas", config.optim.betas),
    ):
        if len(value) != 2:
            meaning = {"model": "[training, inference]", "data": "[smallest, largest]"}.get(
                name.split(".")[0], "[b1, b2]"
            )
            raise ConfigError(f"{name} is {value}: give two numbers, {meaning}")
    smallest, largest = config.data.scale_range
    if smallest > largest:
        raise ConfigError(f"data.scale_range is {config.data.scale_range}: give the smallest scale before the largest")
    for key in ("mask_head_channels", "anchor_ratios"):
        if not getattr(config.model, key):
            raise ConfigError(f"model.{key} is empty: it needs at least one value")
