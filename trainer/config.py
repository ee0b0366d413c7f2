"""Typed settings: dataclasses, a YAML file over their defaults, then `--section.key value` over both.

An unknown section, key or value of the wrong type is an error that names the nearest right one. Nothing here imports
torch, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import yaml

from shards.errors import StorageError, UserError
from shards.storage import Location
from trainer.freeze import parse_layers


class ConfigError(UserError):
    """A setting that does not exist, has the wrong type, or contradicts another."""


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default and the one-line description that `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataConfig:
    """Which samples, how many at once, and how large."""

    shards: str = option("", "root of the shard dataset: s3://bucket/prefix, a local path, any fsspec URL")
    split: str = option("train", "split to train on")
    val_split: str = option("val", "split that is evaluated at the end of an epoch; empty for none")
    classes: list[str] = option(
        [], "classes to train and evaluate on, by name, MID or id, as if the others had no label; empty for all"
    )
    fraction: float = option(1.0, "share of the training split to train on, above 0 to 1; chosen by a hash of ImageID")
    repeat_threshold: float = option(
        0.0, "t of LVIS's repeat factors: classes in a smaller share of the images come more often; 0 for none"
    )
    batch_size: int = option(8, "images a batch on each GPU")
    workers: int = option(2, "loader processes of each GPU; 0 loads in the training process")
    lanes: int = option(8, "independent readings of the epoch; best a multiple of GPUs x workers")
    window: int = option(256, "samples of a lane that are shuffled together")
    group_by_aspect: bool = option(False, "put portrait and landscape images into batches of their own")
    read_ahead_mb: int = option(64, "bytes in MB that each loader process may hold ahead of need")
    cache_dir: str = option("", "folder on a local disk that keeps samples for the next epoch; empty for none")
    cache_mb: int = option(65536, "bytes in MB that the cache of a machine may take, all its processes together")
    stall_s: int = option(30, "a wait of so many seconds for storage is told, with what is waited for")
    resize: Literal["square", "shortest"] = option(
        "square", "square: pad to max_size x max_size; shortest: pad to the largest image of the batch"
    )
    min_size: int = option(800, "the image's shorter side after scaling, in pixels, unless max_size forbids it")
    max_size: int = option(1024, "limit of the image's longer side after scaling, in pixels")
    flip: float = option(0.5, "probability of a horizontal flip")
    max_instances: int = option(
        100, "objects an image to learn from; of more, others each epoch are ignored, not background; 0: no limit"
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
    norm_eps: float = option(1e-5, "what the norms add to the variance; weights made with another are converted")
    weights: str = option(
        "imagenet",
        "start: none, imagenet (backbone), coco (resnet50), a run folder, or path or URL of a state dict",
    )
    fpn_channels: int = option(256, "channels of every FPN level")
    box_head_features: int = option(1024, "width of the box head's two layers")
    mask_head_channels: list[int] = option([256, 256, 256, 256], "width of each convolution of the mask head")
    anchor_sizes: list[int] = option([32, 64, 128, 256, 512], "anchor side of each FPN level, in pixels")
    anchor_ratios: list[float] = option([0.5, 1.0, 2.0], "anchor height over width")
    rpn_pre_nms: list[int] = option([2000, 1000], "proposals kept before NMS: training, inference")
    rpn_post_nms: list[int] = option([2000, 1000], "proposals kept after NMS: training, inference")
    rois_per_image: int = option(512, "RoIs an image that the box head trains on")
    positive_fraction: float = option(0.25, "share of those RoIs that may be positive")
    score_threshold: float = option(0.05, "detections below this score are dropped")
    nms_threshold: float = option(0.5, "detections of a class that overlap a better one by more IoU are dropped")
    detections_per_image: int = option(100, "detections kept of an image")


@dataclass
class LossConfig:
    """What incomplete annotations teach."""

    unmasked: Literal["box", "background"] = option(
        "box", "an object without a mask teaches class and box, or is dropped and so background"
    )
    group_of: Literal["ignore", "object", "background"] = option(
        "ignore", "a group-of box is a region where nothing is taught that matches no object, or an object, or background"
    )
    unverified: Literal["ignore", "absent"] = option(
        "ignore", "a class that is not verified in an image is left out of its classification loss, or taught as absent"
    )


@dataclass
class OptimConfig:
    """SGD with momentum, a linear warm-up and steps down."""

    lr: float = option(0.001, "learning rate after the warm-up")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(1e-4, "weight decay of SGD")
    clip_norm: float = option(5.0, "largest norm of the whole gradient; 0 for no clipping")
    warmup_steps: int = option(100, "steps over which the rate rises linearly from a thousandth")
    milestones: list[int] = option([], "steps at which the rate is multiplied by gamma")
    gamma: float = option(0.1, "factor at each milestone")


@dataclass
class TrainConfig:
    """How long, how often saved and evaluated."""

    epochs: int = option(10, "epochs; each is steps_per_epoch steps, however large the dataset")
    steps_per_epoch: int = option(100, "steps an epoch")
    checkpoint_steps: int = option(100, "a checkpoint every so many steps, and at the end of an epoch")
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept")
    eval_epochs: int = option(1, "evaluate every so many epochs, and after the last")
    eval_batch_size: int = option(4, "images a batch on each GPU in evaluation")
    layers: str = option("3+", "what trains: heads, 5+, 4+, 3+, 2+ (stages of the backbone), all, or a share: last 10%")
    seed: int = option(0, "seed of the order, the augmentation, the initial weights and the RoI sampling")


@dataclass
class RunConfig:
    """Where the run writes."""

    dir: str = option("runs/default", "run folder: a local path or any fsspec URL")
    log_steps: int = option(10, "a line of progress every so many steps (every step is in metrics.jsonl)")


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


def sections() -> dict[str, type]:
    """The sections of `Config` by name."""
    hints = typing.get_type_hints(Config)
    return {item.name: hints[item.name] for item in fields(Config)}


def from_dict(value: Any, where: str) -> Config:
    """Settings from a mapping of sections; what is left out keeps its default.

    Raises:
        ConfigError: an unknown section or key, or a value of the wrong type; `where` is named.
    """
    config = Config()
    if value is None:
        return config
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: holds {type(value).__name__}, not sections of settings such as 'data:'")
    for section, entries in value.items():
        if section not in sections():
            raise ConfigError(f"{where}: unknown section {section!r}{_nearest(str(section), sections())}")
        if not isinstance(entries, dict):
            raise ConfigError(f"{where}: section {section!r} holds {entries!r}, not keys and values")
        for key, entry in entries.items():
            set_option(config, f"{section}.{key}", entry, where)
    return config


def set_option(config: Config, name: str, value: Any, where: str) -> None:
    """Set `section.key`, checked against the field's type.

    Raises:
        ConfigError: no such option, or a value of the wrong type.
    """
    section, _, key = name.partition(".")
    known = {f"{s}.{item.name}" for s, cls in sections().items() for item in fields(cls)}
    if name not in known:
        raise ConfigError(f"{where}: unknown option {name!r}{_nearest(name, known)}")
    hint = typing.get_type_hints(sections()[section])[key]
    setattr(getattr(config, section), key, _checked(value, hint, f"{where}: {name}"))


def load_config(path: str | None, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Defaults, then the YAML file at a path or URL, then overrides `("section.key", "value as YAML")`.

    Raises:
        ConfigError: the file cannot be read, or a setting is wrong.
    """
    config = Config()
    if path is not None:
        try:
            text = Location(path).read().decode("utf-8")
            config = from_dict(yaml.safe_load(text), path)
        except (StorageError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {path}: cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"config {path}: not YAML: {' '.join(str(error).split())}") from error
    for name, text in overrides:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        set_option(config, name, value, "command line")
    validate(config)
    return config


def validate(config: Config) -> None:
    """Check what types cannot say.

    Raises:
        ConfigError: a value out of its range.
    """
    at_least_one = {
        "data": ("batch_size", "lanes", "window", "read_ahead_mb", "cache_mb", "stall_s", "min_size", "max_size"),
        "model": ("fpn_channels", "box_head_features", "rois_per_image", "detections_per_image"),
        "train": (
            "epochs",
            "steps_per_epoch",
            "checkpoint_steps",
            "keep_checkpoints",
            "eval_epochs",
            "eval_batch_size",
        ),
        "run": ("log_steps",),
    }
    for section, keys in at_least_one.items():
        for key in keys:
            if getattr(getattr(config, section), key) < 1:
                raise ConfigError(f"{section}.{key} is {getattr(getattr(config, section), key)}: it must be at least 1")
    for name, value, low, high in (
        ("data.workers", config.data.workers, 0, None),
        ("data.flip", config.data.flip, 0, 1),
        ("data.fraction", config.data.fraction, 0, 1),
        ("data.repeat_threshold", config.data.repeat_threshold, 0, 1),
        ("model.norm_eps", config.model.norm_eps, 0, None),
        ("data.max_instances", config.data.max_instances, 0, None),
        ("model.positive_fraction", config.model.positive_fraction, 0, 1),
        ("model.score_threshold", config.model.score_threshold, 0, 1),
        ("model.nms_threshold", config.model.nms_threshold, 0, 1),
        ("optim.lr", config.optim.lr, 0, None),
        ("optim.clip_norm", config.optim.clip_norm, 0, None),
        ("optim.warmup_steps", config.optim.warmup_steps, 0, None),
    ):
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{name} is {value}: it must be {bounds}")
    parse_layers(config.train.layers)
    if config.data.min_size > config.data.max_size:
        raise ConfigError(f"data.min_size {config.data.min_size} is above data.max_size {config.data.max_size}")
    if len(config.model.anchor_sizes) != 5:
        raise ConfigError(f"model.anchor_sizes has {len(config.model.anchor_sizes)} values: the FPN has 5 levels")
    for key in ("rpn_pre_nms", "rpn_post_nms"):
        if len(getattr(config.model, key)) != 2:
            raise ConfigError(f"model.{key} is {getattr(config.model, key)}: give two numbers, [training, inference]")
    for key in ("mask_head_channels", "anchor_ratios"):
        if not getattr(config.model, key):
            raise ConfigError(f"model.{key} is empty: it needs at least one value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a command `--config` and every `--section.key`, with descriptions and defaults."""
    parser.add_argument("--config", metavar="YAML", help="settings file, such as configs/traffic.yaml: a path or a URL")
    for section, cls in sections().items():
        group = parser.add_argument_group(section, (cls.__doc__ or "").splitlines()[0])
        for item in fields(cls):
            default = getattr(cls(), item.name)
            shown = yaml.safe_dump(default, default_flow_style=True).splitlines()[0]
            group.add_argument(
                f"--{section}.{item.name}",
                dest=f"{section}.{item.name}",
                metavar="VALUE",
                default=argparse.SUPPRESS,
                help=f"{item.metadata['help']} [{shown}]".replace("%", "%%"),
            )


def from_arguments(arguments: argparse.Namespace) -> Config:
    """The settings of a command that has `add_arguments`.

    Raises:
        ConfigError: as `load_config`.
    """
    overrides = [(name, value) for name, value in vars(arguments).items() if "." in name]
    return load_config(arguments.config, overrides)


def save_config(config: Config, location: Location) -> None:
    """Write the resolved settings as YAML; `load_config` reads them back."""
    location.write(yaml.safe_dump(config.to_dict(), sort_keys=False).encode("utf-8"))


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f": did you mean {' or '.join(close)}?" if close else f": known are {', '.join(sorted(known))}"


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: {value!r} is not a list such as [1, 2]")
        return [_checked(entry, arguments[0], where) for entry in value]
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _checked(value, next(a for a in arguments if a is not type(None)), where)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4 (no dot) as text.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is str and value is None:
        return ""
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: {value!r} is not {'an' if hint is int else 'a'} {hint.__name__}")
    return value
