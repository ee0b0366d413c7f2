"""Settings of a training run: a dataclass per section, with a default and a line of help per option.

Imports no torch, so that `--help` is quick.
"""

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from shards.commands.options import ConfigError as ConfigError
from shards.commands.options import check, check_range, option
from shards.common.text import counted
from trainer.config.layer_names import parse_layers

DROPPED_BY_NMS = "IoU above which NMS drops the lower-scoring one of two detections of a class"

AUTO = 0  # `data.batch_size`: the most images that fit


@dataclass
class DataConfig:
    """Dataset, batches, loading, resizing and augmentation."""

    shards: str = option("", "root of the shard dataset: s3://bucket/prefix, a local path, any fsspec URL")
    split: str = option("train", "split to train on")
    val_split: str = option("val", "split to evaluate during training; empty for no evaluation")
    classes: list[str] = option([], "classes by name, MID or id; objects of other classes are ignored; empty for all")
    fraction: float = option(1.0, "share of the training split to use, above 0, by a hash of ImageID", low=0, high=1)
    repeat_threshold: float = option(
        0.0, "repeat images of classes in less than this share of images (LVIS's t); 0 for none", low=0, high=1
    )
    batch_size: int = option(
        8,
        "images per batch on each GPU; auto, or 0, for the most that fit its memory, found at the start of the run",
        low=0,
        named={"auto": AUTO},
    )
    workers: int = option(2, "loader processes per GPU; 0 to load in the training process", low=0)
    lanes: int = option(8, "sequential reads that batches are mixed from; best a multiple of GPUs x workers", low=1)
    window: int = option(128, "samples of a lane that are shuffled together", low=1)
    group_by_aspect: bool = option(False, "put portrait and landscape images into separate batches")
    read_ahead_mb: int = option(128, "memory for prefetched samples per loader process, in MB", low=1)
    cache_dir: str = option("", "folder on a local disk that caches samples for the next epoch; empty for no cache")
    cache_mb: int = option(65536, "maximum size of the cache of a machine, shared by all its processes, in MB", low=1)
    skip_bad: int = option(
        0,
        "number of training samples with damaged bytes, image or JSON that are replaced by their neighbours in the "
        "run; one more is an error",
        low=0,
    )
    stall_s: int = option(30, "log a message when storage does not answer for more than this many seconds", low=1)
    resize: Literal["square", "shortest", "oriented", "scale_jitter"] = option(
        "square",
        "square: pad to max_size x max_size; shortest: pad to the largest image of the batch; oriented: pad to "
        "max_size x min_size or the other way round, with group_by_aspect; scale_jitter: scale randomly within "
        "scale_range, then crop or pad to max_size x max_size",
    )
    min_size: int = option(800, "shorter side of a scaled image in pixels; less if the longer exceeds max_size", low=1)
    max_size: int = option(1024, "maximum longer side of an image after scaling, in pixels", low=1)
    min_sizes: list[int] = option([], "shorter sides to choose from at random, in pixels; empty for min_size", low=1)
    scale_range: list[float] = option(
        [0.1, 2.0], "smallest and largest scale for scale_jitter; at scale 1 the image fits max_size", low=0.01
    )
    flip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    rotate: float = option(0.0, "maximum rotation in either direction, in degrees", low=0, high=180)
    shear: float = option(0.0, "maximum shear along x in either direction, in degrees", low=0, high=60)
    translate: float = option(
        0.0, "maximum shift in either direction, as a share of the width and of the height", low=0, high=1
    )
    max_instances: int = option(
        100,
        "maximum number of objects per image to train on; of more objects, a random choice per epoch is kept and the "
        "others are ignored, not background; 0 for no limit",
        low=0,
    )
    iou_crop: float = option(0.0, "probability of SSD's random crop, which contains an object's centre", low=0, high=1)
    photometric: float = option(0.0, "probability of each change: brightness, contrast, saturation, hue", low=0, high=1)
    mosaic: float = option(0.0, "probability of a mosaic with the next three images of the batch", low=0, high=1)
    copy_paste: float = option(0.0, "probability of pasting objects of the next image of the batch", low=0, high=1)


@dataclass
class ModelConfig:
    """torchvision's Mask R-CNN: backbone, layer sizes, sampling and detection."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v3_large"] = option(
        "resnet50", "backbone under the FPN: a ResNet, or a MobileNet for small machines"
    )
    version: Literal["v1", "v2"] = option("v1", "v1, or v2: norms in FPN and heads, deeper RPN and box head")
    norm: Literal["frozen", "batch", "group"] = option(
        "frozen",
        "norm layers of the backbone: batch norm with frozen statistics, batch norm, or group norm (heads of v2: batch "
        "norm, or group norm with group)",
    )
    norm_eps: float = option(1e-5, "epsilon of the norms; weights trained with another are converted", low=1e-12)
    weights: str = option(
        "imagenet",
        "initial weights: none, imagenet (backbone), coco (resnet50), a run folder, or path or URL of a state dict",
    )
    fpn_channels: int = option(256, "channels per FPN level", low=1)
    box_head_features: int = option(1024, "features of the box head's two fully connected layers", low=1)
    mask_head_channels: list[int] = option([256, 256, 256, 256], "channels of the mask head's convolutions", low=1)
    mask_head: Literal["per_class", "agnostic"] = option(
        "per_class", "masks per RoI: one per class, or one, which also serves classes without masks"
    )
    mask_rois: Literal["proposals", "gt"] = option(
        "proposals", "RoIs that the mask head is trained on: positive proposals, or the annotated boxes"
    )
    anchor_sizes: list[int] = option([32, 64, 128, 256, 512], "anchor size per FPN level, in pixels", low=1)
    anchor_ratios: list[float] = option([0.5, 1.0, 2.0], "anchor heights divided by widths", low=0.01)
    rpn_pre_nms: list[int] = option([2000, 1000], "proposals kept before NMS, in training and in inference", low=1)
    rpn_post_nms: list[int] = option([2000, 1000], "proposals kept after NMS, in training and in inference", low=1)
    rois_per_image: int = option(512, "RoIs per image that the box head is trained on", low=1)
    positive_fraction: float = option(0.25, "maximum share of positive RoIs among them", low=0, high=1)
    score_threshold: float = option(0.05, "lowest score of a detection", low=0, high=1)
    nms_threshold: float = option(0.5, DROPPED_BY_NMS, low=0, high=1)
    detections_per_image: int = option(100, "maximum number of detections per image", low=1)


@dataclass
class LossConfig:
    """Weights of the five losses, and the treatment of incomplete annotations."""

    objectness: float = option(1.0, "weight of the RPN's objectness loss", low=0)
    rpn_box_reg: float = option(1.0, "weight of the RPN's box loss", low=0)
    classifier: float = option(1.0, "weight of the classification loss", low=0)
    box_reg: float = option(1.0, "weight of the box loss", low=0)
    mask: float = option(1.0, "weight of the mask loss", low=0)
    mask_box: float = option(1.0, "weight of the loss of masks against their boxes, with unmasked masks", low=0)
    mask_affinity: float = option(
        0.5, "weight of the loss between neighbours of like colour, with unmasked masks", low=0
    )
    affinity_warmup: int = option(
        100, "steps over which the weight of mask_affinity rises from 0, and then that of mask_teacher", low=0
    )
    mask_teacher: float = option(
        1.0, "weight of the loss of masks against those that train.ema's average predicts, with unmasked masks", low=0
    )
    predicted: float = option(
        1.0, "weight of predicted masks in the mask loss; 0 to treat their objects as those without a mask", low=0
    )
    unmasked: Literal["box", "masks", "background"] = option(
        "box",
        "objects without a mask: train class and box; also masks, from boxes and colours, as do objects with a "
        "predicted mask; or background",
    )
    group_of: Literal["ignore", "object", "background"] = option(
        "ignore",
        "group-of boxes: ignore RoIs and anchors in them that match no object, treat the box as an object, or as "
        "background",
    )
    unverified: Literal["ignore", "absent"] = option(
        "ignore", "classes without image-level verification: no loss for them in background RoIs, or train as absent"
    )


@dataclass
class OptimConfig:
    """Optimizer and learning rate: a linear warm-up per stage, then steps or a cosine over the whole run."""

    optimizer: Literal["sgd", "adamw"] = option("sgd", "SGD with momentum, or AdamW")
    lr: float = option(0.001, "learning rate after the warm-up", low=0)
    base_batch: int = option(0, "images per step of all GPUs that lr is for (scaled linearly); 0 for no scaling", low=0)
    momentum: float = option(0.9, "momentum of sgd", low=0, high=1)
    betas: list[float] = option([0.9, 0.999], "decay rates of adamw's two moments, below 1", low=0, high=0.999999)
    weight_decay: float = option(1e-4, "weight decay", low=0)
    decay_norms: bool = option(True, "whether weight decay applies to norm layers and biases, too")
    clip_norm: float = option(5.0, "maximum norm of the gradient of all parameters; 0 for no clipping", low=0)
    warmup_steps: int = option(100, "steps of the linear warm-up, which starts at lr / 1000", low=0)
    schedule: Literal["step", "cosine"] = option("step", "after the warm-up: steps at milestones, or a cosine")
    milestones: list[int] = option([], "steps of the run at which lr is multiplied by gamma, with step", low=0)
    gamma: float = option(0.1, "factor at each milestone, with step", low=0)
    final_lr: float = option(0.0, "learning rate at the end of the run as a share of lr, with cosine", low=0, high=1)


@dataclass
class StageConfig:
    """One entry of `train.stages`."""

    layers: str = option("all", "as train.layers")
    epochs: int = option(1, "epochs of this stage", low=1)
    lr: float = option(1.0, "factor on optim.lr", low=0)


@dataclass
class TrainConfig:
    """Length of the run, trained layers, precision, checkpoints and evaluation."""

    epochs: int = option(10, "epochs of steps_per_epoch steps; ignored with stages", low=1)
    steps_per_epoch: int = option(100, "steps per epoch, whatever the size of the dataset", low=1)
    layers: str = option(
        "3+",
        "layers to train; ignored with stages: heads, 5+ to 2+ (heads and the backbone from that stage on), all, or a "
        "share such as last 10%",
    )
    stages: list[StageConfig] = option([], "stages, such as [{layers: heads, epochs: 2}, {layers: all, lr: 0.1}]")
    accumulate: int = option(1, "batches per step on each GPU, for gradient accumulation", low=1)
    ema: float = option(
        0.0, "decay of a moving average of the weights, evaluated and saved, such as 0.999; 0 to disable", low=0, high=1
    )
    precision: Literal["launcher", "fp32", "bf16", "fp16"] = option(
        "launcher", "precision of training; launcher: that of accelerate's --mixed_precision"
    )
    channels_last: bool = option(False, "store the weights of convolutions in channels-last order")
    frozen_norms: Literal["fp32", "autocast"] = option(
        "fp32",
        "precision of what frozen norms return: fp32, as in torchvision, or autocast's, for less memory and time",
    )
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = option(
        "no",
        "compile the training step with torch.compile in this mode; reduce-overhead and max-autotune use CUDA graphs, "
        "on one GPU without accumulation",
    )
    skip_nonfinite: int = option(0, "most steps of non-finite loss or gradient to skip; the next ends the run", low=0)
    checkpoint_steps: int = option(100, "steps between checkpoints; the end of an epoch is saved as well", low=1)
    keep_checkpoints: int = option(2, "number of newest checkpoints to keep", low=1)
    eval_epochs: int = option(1, "epochs between evaluations; the last epoch is evaluated as well", low=1)
    patience: int = option(
        0,
        "end the run after this many evaluations without a better mask AP (without masks: box AP); 0 to disable",
        low=0,
    )
    checkpoint_activations: bool = option(
        False, "compute the backbone's activations a second time in the backward pass instead of storing them"
    )
    eval_batch_size: int = option(4, "images per batch on each GPU in evaluation", low=1)
    seed: int = option(0, "seed of the sample order, augmentation, initial weights and RoI sampling")


@dataclass
class RunConfig:
    """Output of the run."""

    dir: str = option("runs/default", "run folder: a local path or any fsspec URL")
    resume: str = option("", "checkpoint to resume: last (the newest of run.dir, which must exist), or its path or URL")
    log_steps: int = option(10, "steps between lines of progress (metrics.jsonl has every step)", low=1)
    pictures: int = option(4, "images drawn at each evaluation, with ground truth and predictions side by side", low=0)
    trackers: list[str] = option(["tensorboard"], "accelerate's experiment trackers, such as [wandb]; [] for none")


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def has_teacher(self) -> bool:
        """Whether the average of the weights teaches the masks of objects without one of the source."""
        return self.train.ema > 0 and self.loss.unmasked == "masks" and self.loss.mask_teacher > 0

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain values per section, as the YAML file holds them."""
        return dataclasses.asdict(self)


# Options of two numbers, and what these are.
_PAIRS = {
    "model.rpn_pre_nms": "[training, inference]",
    "model.rpn_post_nms": "[training, inference]",
    "data.scale_range": "[smallest, largest]",
    "optim.betas": "[b1, b2]",
}


def validate(config: Config) -> None:
    """Raise ConfigError for a value out of its range, or one that contradicts another."""
    check(config)
    for number, stage in enumerate(config.train.stages):
        for item in fields(stage):
            check_range(f"train.stages[{number}].{item.name}", getattr(stage, item.name), item)
        parse_layers(stage.layers)
    parse_layers(config.train.layers)
    data, model = config.data, config.model
    for name, meaning in _PAIRS.items():
        section, _, key = name.partition(".")
        value = getattr(getattr(config, section), key)
        if len(value) != 2:
            raise ConfigError(f"{name} is {value}: give two numbers, {meaning}")
    for key in ("mask_head_channels", "anchor_ratios"):
        if not getattr(model, key):
            raise ConfigError(f"model.{key} is empty: give at least one value")
    if len(model.anchor_sizes) != 5:
        raise ConfigError(f"model.anchor_sizes has {counted(len(model.anchor_sizes), 'value')}: the FPN has 5 levels")
    if data.resize == "oriented" and not data.group_by_aspect:
        raise ConfigError("data.resize is oriented, which needs batches of one orientation: set data.group_by_aspect")
    if data.resize == "oriented" and data.iou_crop:
        raise ConfigError("data.iou_crop changes orientations: set data.resize to square, shortest or scale_jitter")
    if data.resize == "shortest" and config.train.compile != "no":
        raise ConfigError(
            f"train.compile is {config.train.compile}, and with data.resize shortest nearly every batch has a shape of "
            "its own to compile: set data.resize to square or oriented, or train.compile to no"
        )
    if config.train.checkpoint_activations and model.norm == "batch":
        raise ConfigError(
            "train.checkpoint_activations computes activations twice, and batch norms (model.norm batch) would count "
            "both: use model.norm frozen or group"
        )
    if config.loss.unmasked == "masks" and (data.rotate or data.shear):
        raise ConfigError(
            "loss.unmasked is masks, and an object that data.rotate or data.shear has turned need not reach the sides "
            "of its box: set both to 0, or loss.unmasked to box"
        )
    if data.copy_paste and data.batch_size == 1:
        raise ConfigError("data.copy_paste pastes objects of another image of the batch: set data.batch_size above 1")
    if data.mosaic and AUTO < data.batch_size < 4:
        raise ConfigError("data.mosaic joins four images of the batch: set data.batch_size to 4 or more")
    if any(size > data.max_size for size in data.min_sizes):
        raise ConfigError(f"data.min_sizes {data.min_sizes} are not all within data.max_size {data.max_size}")
    if data.min_size > data.max_size:
        raise ConfigError(f"data.min_size {data.min_size} is above data.max_size {data.max_size}")
    smallest, largest = data.scale_range
    if smallest > largest:
        raise ConfigError(f"data.scale_range is {data.scale_range}: give the smallest scale before the largest")
