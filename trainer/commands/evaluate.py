"""Evaluate a checkpoint on a split of a shard dataset: COCO's AP and Open Images' side by side.

Every image is evaluated once, on any number of processes. AP needs detections of any score: those of 0.05 or more are
evaluated even if the checkpoint's own threshold is higher, because that would truncate the curves. See
docs/evaluating.md.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shards.commands.options import add_options, from_arguments
from shards.common.errors import DatasetError
from shards.common.redact import HIDDEN, redact, redact_values
from shards.common.text import counted
from shards.storage.location import Location
from trainer.commands import command_line as command
from trainer.config.command_options import LOWEST_EVALUATED_SCORE, EvaluateOptions
from trainer.config.settings import DataConfig, ModelConfig, TrainConfig
from trainer.run.distributed import main_can_write, start_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torchvision.models.detection import MaskRCNN

    from shards.format.dataset import Category, Dataset
    from shards.stream.streams import EvalStream
    from trainer.data.collate import EvalBatch
    from trainer.metrics.confusion import Confusion
    from trainer.metrics.metric import Gather
    from trainer.metrics.openimages import Parents
    from trainer.metrics.overlaps import EvaluatedImage
    from trainer.report.scorecard import Evaluation

log = logging.getLogger("trainer.commands.evaluate")


def main(arguments: Sequence[str] | None = None, program: str = "evaluate.py") -> int:
    """Run the command and return its exit status."""
    return command.run("evaluate", lambda: evaluate_checkpoint(parse(arguments, program)))


def parse(arguments: Sequence[str] | None, program: str = "evaluate.py") -> EvaluateOptions:
    """Return the options of a command line."""
    parser = command.Parser(program, "Evaluate a checkpoint: COCO's AP and Open Images' side by side.")
    add_options(parser, EvaluateOptions)
    return from_arguments(EvaluateOptions, parser.parse_args(arguments))


def evaluate_checkpoint(options: EvaluateOptions) -> None:
    """Evaluate the checkpoint, print the table and write the files; UserError if the inputs do not fit together."""
    command.start_logging()

    from shards.format.dataset import open_dataset  # not at the top: --help answers without pyarrow

    dataset = open_dataset(options.shards) if options.shards else None
    if dataset is not None:
        dataset.index(options.split)  # reports a wrong split before seconds of loading

    from trainer.metrics.confusion import ConfusionMetric
    from trainer.metrics.hierarchy import read_parents
    from trainer.model.build import rebuild
    from trainer.model.checkpoint import open_checkpoint
    from trainer.report.best_worst_page import BestWorstPage
    from trainer.report.scorecard import summary

    accelerator = start_accelerator()
    out = Location(options.out or f"{Location(options.checkpoint)}/evaluation-{options.split}")
    if options.out:
        main_can_write(out, "--out", accelerator)
    state = open_checkpoint(options.checkpoint)
    if not options.out:  # not earlier: a missing checkpoint should be reported as such
        main_can_write(out, "--out", accelerator)
    config = state.config
    dataset = (dataset or open_stored(config.data.shards)).select(classes=config.data.classes or None)
    check_classes(state.categories, dataset.categories, options.checkpoint, str(dataset.root))
    parents = read_parents(Location(options.hierarchy), dataset.categories) if options.hierarchy else {}
    network = rebuild(state)
    thresholds = set_thresholds(network, config.model, options)
    network.to(accelerator.device)
    config.data.cache_dir = ""  # it belongs to the machine that trained
    config.data.workers, config.train.eval_batch_size = options.workers, options.batch_size
    confusion = ConfusionMetric(dataset.categories, options.score)
    pictures = BestWorstPage(dataset.categories, parents, options.pictures, options.score)

    def watch(pixels: Sequence[Tensor], images: Sequence[EvaluatedImage]) -> None:
        confusion.process(images)
        pictures.add(pixels, images)

    result = evaluate(
        network, dataset, options.split, accelerator, config.data, config.train, parents=parents, watch=watch
    )
    gather = gather_to_main(accelerator)
    title = redact(f"{options.checkpoint}, step {state.step}, on {options.split} of {dataset.root}")
    matrix, page = confusion.evaluate(gather), pictures.render(title, result, gather)
    if result is not None and matrix is not None and page is not None:
        context = {
            "checkpoint": options.checkpoint,
            "step": state.step,
            "shards": str(dataset.root),
            "split": options.split,
            **thresholds,
            "parents": {str(child): list(above) for child, above in parents.items()},
        }
        names = write_results(out, context, dataset.categories, result, matrix, page)
        command.say(f"{title}\n{describe_thresholds(thresholds, config.model)}\n{summary(result)}\n")
        command.say(f"all numbers: {out / 'evaluation.json'}; in the same folder: {', '.join(names)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def open_stored(shards: str) -> Dataset:
    """Open the dataset of a checkpoint's training; DatasetError if its URL was stored without its credentials."""
    from shards.format.dataset import open_dataset

    if HIDDEN in shards:
        raise DatasetError(f"the checkpoint does not have the credentials of its dataset, {shards}: give --data.shards")
    return open_dataset(shards)


def write_results(
    out: Location,
    context: dict[str, Any],
    categories: Sequence[Category],
    result: Evaluation,
    matrix: Confusion,
    page: bytes,
) -> list[str]:
    """Write the files of an evaluation, of which `context` says what was evaluated; return their names."""
    from trainer.report.score_plots import draw_confusion, draw_precision_recall
    from trainer.report.scorecard import class_csv, confusion_csv

    files = {
        "classes.csv": class_csv(result, categories).encode("utf-8"),
        "curves.png": draw_precision_recall(result),
        "confusion.csv": confusion_csv(matrix).encode("utf-8"),
        "confusion.png": draw_confusion(matrix),
        "images.html": page,
    }
    for name, data in files.items():
        (out / name).write(data)
    value = {**redact_values(context), **result.to_json(), "confusion": matrix.to_json()}
    (out / "evaluation.json").write(json.dumps(value, indent=1, allow_nan=False).encode("utf-8"))
    return list(files)


def set_thresholds(network: MaskRCNN, model: ModelConfig, options: EvaluateOptions) -> dict[str, Any]:
    """Set the network's thresholds to the command's, else the checkpoint's; return them by their settings' names."""
    score = options.score_threshold
    if score is None:
        score = min(model.score_threshold, LOWEST_EVALUATED_SCORE)
    nms = model.nms_threshold if options.nms_threshold is None else options.nms_threshold
    most = options.detections or model.detections_per_image
    heads = network.roi_heads
    heads.score_thresh, heads.nms_thresh, heads.detections_per_img = score, nms, most
    return {"score_threshold": score, "nms_threshold": nms, "detections_per_image": most}


def describe_thresholds(used: dict[str, Any], model: ModelConfig) -> str:
    """Return a line with the thresholds in use, and the checkpoint's own where they differ."""
    line = (
        f"scores of {used['score_threshold']:g} or more, NMS at {used['nms_threshold']:g}, "
        f"at most {counted(used['detections_per_image'], 'detection')} per image"
    )
    changed = [f"{name} {getattr(model, name):g}" for name, value in used.items() if getattr(model, name) != value]
    return line + (f" (the checkpoint's own: {', '.join(changed)})" if changed else "")


def check_classes(known: Sequence[Category], asked: Sequence[Category], checkpoint: str, dataset: str) -> None:
    """Check that a network's classes (`known`) are the dataset's (`asked`), by id and name; DatasetError if not."""
    network_names, dataset_names = ({category.id: category.name for category in side} for side in (known, asked))
    for number in sorted(network_names.keys() | dataset_names.keys()):
        if network_names.get(number) != dataset_names.get(number):
            raise DatasetError(
                f"class {number} is {dataset_names.get(number, 'missing')!r} in {dataset}, and "
                f"{network_names.get(number, 'missing')!r} in the checkpoint {checkpoint}: "
                "they must have the same classes"
            )


def evaluate(
    network: MaskRCNN,
    dataset: Dataset,
    split: str,
    accelerator: Accelerator,
    data: DataConfig,
    train: TrainConfig,
    *,
    parents: Parents | None = None,
    watch: Callable[[Sequence[Tensor], Sequence[EvaluatedImage]], None] | None = None,
) -> Evaluation | None:
    """Evaluate a network on every image of a split, on all ranks together; return the result on the main rank only.

    Args:
        network: on the accelerator's device; its mode (training or not) is restored.
        dataset: with the classes of the network.
        data: `workers`, `read_ahead_mb`, `stall_s` and the cache's options are used.
        train: `eval_batch_size` is used.
        parents: for the Open Images AP, of classes that are kinds of others.
        watch: called with each batch of this rank: the pixels, and the images with their detections.
    """
    from shards.commands.progress import Progress
    from shards.stream.loader import loader
    from trainer.metrics.coco import CocoMetric
    from trainer.metrics.openimages import OpenImagesMetric
    from trainer.metrics.overlaps import EvaluatedImage
    from trainer.model.inference import detect_batches
    from trainer.report.scorecard import Evaluation

    coco, open_images = CocoMetric(dataset.categories), OpenImagesMetric(dataset.categories, parents)
    was_training = network.training
    stream = open_stream(dataset, split, accelerator, data, train)
    batches = loader(stream, workers=data.workers, pin_memory=accelerator.device.type == "cuda")
    own, is_main = len(dataset.index(split)) / accelerator.num_processes, accelerator.is_main_process
    with Progress(f"evaluating {split}", own, "images", log.info, is_shown=is_main) as progress:
        for batch, found in detect_batches(network.eval(), batches, accelerator.device):
            images = [EvaluatedImage(*pair) for pair in zip(batch.samples, found, strict=True)]
            coco.process(images)
            open_images.process(images)
            if watch is not None:
                watch(batch.images, images)
            progress.advance(len(images))
    network.train(was_training)

    gather = gather_to_main(accelerator)
    by_coco, by_open_images = coco.evaluate(gather), open_images.evaluate(gather)
    if by_coco is None or by_open_images is None:
        return None
    if by_coco.images != len(dataset.index(split)):
        raise RuntimeError(f"{by_coco.images} images were evaluated, split {split!r} has {len(dataset.index(split))}")
    return Evaluation(by_coco, by_open_images)


def open_stream(
    dataset: Dataset, split: str, accelerator: Accelerator, data: DataConfig, train: TrainConfig
) -> EvalStream[EvalBatch]:
    """Return the stream of this rank's share of a split."""
    from shards.stream.streams import EvalStream
    from trainer.data.collate import EvalCollate, sample_cache
    from trainer.model.build import num_classes

    return EvalStream(
        dataset,
        split,
        batch_size=train.eval_batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        read_ahead=data.read_ahead_mb * 2**20,
        cache=sample_cache(data),
        stall_s=data.stall_s,
        collate=EvalCollate(num_classes(dataset.categories)),
    )


def gather_to_main(accelerator: Accelerator) -> Gather:
    """Return a function that joins the lists of all ranks on the main rank, and returns None on the others."""
    from accelerate.utils import gather_object

    def gather(items: list[Any]) -> list[Any] | None:
        everything: list[Any] = gather_object(items)
        return everything if accelerator.is_main_process else None

    return gather


if __name__ == "__main__":
    sys.exit(main())
