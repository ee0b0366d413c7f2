"""Options of the commands `evaluate`, `predict`, `fill`, `compare` and `export --to onnx`. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from shards.commands.options import option
from trainer.config.settings import DROPPED_BY_NMS, DataConfig, TrainConfig

LOWEST_EVALUATED_SCORE = 0.05  # detections below this score change no AP that matters

_A_DATASET = "a shard dataset instead of images"
_HIERARCHY = "Open Images' class hierarchy (bbox_labels_600_hierarchy.json): "


@dataclass
class EvaluateOptions:
    """Options of `evaluate`."""

    checkpoint: str = option("", "folder of a run, or of one checkpoint", required=True, metavar="URL")
    shards: str = option("", "shard dataset", default_help="that of the training", flag="data.shards", metavar="URL")
    split: str = option("val", "split to evaluate", flag="data.split", metavar="NAME")
    workers: int = option(DataConfig().workers, "loader processes per rank", low=0, flag="data.workers")
    batch_size: int = option(TrainConfig().eval_batch_size, "images per batch on each rank", low=1)
    score_threshold: float | None = option(
        None,
        "lowest score of a detection",
        default_help=f"the checkpoint's, but at most {LOWEST_EVALUATED_SCORE:g}, because a higher one cuts AP short",
        low=0,
        high=1,
    )
    nms_threshold: float | None = option(None, DROPPED_BY_NMS, default_help="the checkpoint's", low=0, high=1)
    detections: int | None = option(
        None, "maximum detections per image; COCO evaluates 100 per class", low=1, default_help="the checkpoint's"
    )
    hierarchy: str = option(
        "", _HIERARCHY + "detections and objects count for parent classes in the Open Images AP", metavar="URL"
    )
    score: float = option(0.5, "lowest score in the confusion matrix and in the pictures", low=0, high=1)
    pictures: int = option(12, "how many of the worst and of the best images images.html shows", low=0)
    out: str = option("", "folder for the results", default_help="evaluation-SPLIT in --checkpoint", metavar="URL")


@dataclass
class PredictOptions:
    """Options of `predict`."""

    images: list[str] = option([], "paths, folders, globs or URLs of images", positional=True, metavar="IMAGE")
    checkpoint: str = option("", "folder of a run, or of one checkpoint", required=True, metavar="URL")
    out: str = option("", "folder for the pictures and predictions.json", required=True, metavar="URL")
    score: float = option(0.5, "lowest score of a detection", low=0, high=1)
    workers: int = option(4, "loader processes per rank, which read and decode images", low=0, flag="data.workers")
    batch_size: int = option(4, "images of one shape per batch on each rank", low=1)
    device: str = option("", "device for images: cuda or cpu", default_help="a GPU if available", metavar="NAME")
    pictures: bool | None = option(None, "draw the detections", default_help="yes for images, no for --data.shards")
    submission: bool = option(False, "write submission.csv in the format of the Open Images Challenge")
    hierarchy: str = option("", _HIERARCHY + "objects are submitted for parent classes as well", metavar="URL")
    shards: str = option("", "root of the dataset", flag="data.shards", group=_A_DATASET, metavar="URL")
    split: str = option("val", "split to predict", flag="data.split", group=_A_DATASET, metavar="NAME")
    part_images: int = option(
        256,
        "images per part, in whole batches; an interruption loses at most one part per rank",
        low=1,
        group=_A_DATASET,
    )


@dataclass
class FillOptions:
    """Options of `fill`."""

    checkpoint: str = option("", "folder of a run, or of one checkpoint", required=True, metavar="URL")
    shards: str = option("", "root of the dataset", required=True, flag="data.shards", metavar="URL")
    out: str = option("", "root of the new dataset", required=True, metavar="URL")
    splits: list[str] = option(
        ["train"], "splits to predict masks in; the others are copied", flag="data.split", metavar="NAME"
    )
    score: float = option(0.0, "lowest score of a mask; objects with a lower one keep a box only", low=0, high=1)
    workers: int = option(4, "loader processes per rank", low=0, flag="data.workers")
    batch_size: int = option(4, "images of one shape per batch on each rank", low=1)


@dataclass
class CompareOptions:
    """Options of `compare`, besides the settings of the runs."""

    comparison: str = option(
        "", "a name such as compare-layers, or the path or URL of a YAML file", positional=True, metavar="NAME"
    )
    launch: str = option("", "arguments of accelerate launch, as one text", metavar="TEXT")


@dataclass
class OnnxOptions:
    """Options of `maskstream export --to onnx`."""

    checkpoint: str = option("", "folder of a run, or of one checkpoint", positional=True, metavar="CHECKPOINT")
    to: Literal["onnx"] = option("", "format to write", required=True)
    out: str = option("", "file to write, which must not exist", required=True, metavar="FILE")
