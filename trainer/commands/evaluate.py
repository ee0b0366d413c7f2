"""Rate a checkpoint on a split of a shard dataset: COCO's AP and Open Images' side by side.

    accelerate launch trainer/evaluate.py --checkpoint runs/traffic --data.shards s3://bucket/prefix --data.split val

Every image is rated once, whatever the number of processes. A table is printed. --out is a folder that receives
evaluation.json, classes.csv, curves.png (precision over recall), confusion.csv, confusion.png, and images.html: the
images that went worst and best.

AP asks for detections of any score: they are rated from 0.05 on, even where the checkpoint's own threshold is higher
and would cut the curves short.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shards.common.errors import DatasetError
from shards.common.options import add_options, from_arguments
from shards.common.text import counted
from shards.format.dataset import Category, Dataset, open_dataset
from shards.storage.location import Location
from trainer.commands import command_line as command
from trainer.config.command_options import LOWEST_EVALUATED_SCORE, EvaluateOptions
from trainer.config.settings import DataConfig, ModelConfig, TrainConfig
from trainer.report.scorecard import Evaluation, class_csv, confusion_csv
from trainer.report.scorecard import summary as summary  # the training loop prints it, too
from trainer.run.distributed import main_can_write, start_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torchvision.models.detection import MaskRCNN

    from trainer.data.collate import EvalBatch
    from trainer.metrics import Gather
    from trainer.metrics.openimages import Parents
    from trainer.model.inference import Detections

log = logging.getLogger("trainer.commands.evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return command.run("evaluate", lambda: evaluate_checkpoint(parse(arguments)))


def parse(arguments: Sequence[str] | None) -> EvaluateOptions:
    """Return the options of a command line.

    Raises:
        UserError: a wrong argument.
    """
    parser = command.Parser(
        prog="evaluate.py", description="Evaluate a checkpoint: COCO's AP and Open Images' side by side."
    )
    add_options(parser, EvaluateOptions)
    return from_arguments(EvaluateOptions, parser.parse_args(arguments))


def evaluate_checkpoint(options: EvaluateOptions) -> None:
    """Rate what `--checkpoint` names; print the table and write the files.

    Raises:
        UserError: checkpoint, dataset or hierarchy cannot be had, or do not go together; --out cannot be written.
    """
    command.start_logging()
    dataset = open_dataset(options.shards) if options.shards else None
    if dataset is not None:
        dataset.index(options.split)  # a wrong split is told before seconds of loading

    from trainer.metrics.confusion import ConfusionMetric
    from trainer.metrics.hierarchy import read_parents
    from trainer.model.build import rebuild
    from trainer.model.checkpoint import open_checkpoint
    from trainer.report.best_worst_page import Gallery

    accelerator = start_accelerator()
    out = Location(options.out or f"{Location(options.checkpoint)}/evaluation-{options.split}")
    if options.out:
        main_can_write(out, "--out", accelerator)
    state = open_checkpoint(options.checkpoint)
    if not options.out:  # not before: of a checkpoint that is not there, it is that which should be told
        main_can_write(out, "--out", accelerator)
    dataset = (dataset or open_dataset(state.config.data.shards)).select(classes=state.config.data.classes or None)
    check_classes(state.categories, dataset.categories, options.checkpoint, str(dataset.root))
    parents = read_parents(Location(options.hierarchy), dataset.categories) if options.hierarchy else {}
    network = rebuild(state)
    thresholds = set_thresholds(network, state.config.model, options)
    network.to(accelerator.device)
    state.config.data.cache_dir = ""  # of the machine that trained
    state.config.data.workers, state.config.train.eval_batch_size = options.workers, options.batch_size
    confusion = ConfusionMetric(dataset.categories, options.score)
    gallery = Gallery(dataset.categories, parents, options.pictures, options.score)

    def watch(batch: EvalBatch, found: list[Detections]) -> None:
        confusion.process(batch.samples, found)
        gallery.add(batch, found)

    result = evaluate(
        network,
        dataset,
        options.split,
        accelerator,
        state.config.data,
        state.config.train,
        parents=parents,
        watch=watch,
    )
    gather = gather_to_main(accelerator)
    title = f"{options.checkpoint}, step {state.step}, on {options.split} of {dataset.root}"
    matrix, page = confusion.evaluate(gather), gallery.page(title, gather)
    if result is not None and matrix is not None and page is not None:
        from trainer.report.score_plots import draw_confusion, draw_precision_recall

        value = {
            "checkpoint": options.checkpoint,
            "step": state.step,
            "shards": str(dataset.root),
            "split": options.split,
            **thresholds,
            "parents": {str(child): list(above) for child, above in parents.items()},
            **result.to_json(),
            "confusion": matrix.to_json(),
        }
        files = {
            "classes.csv": class_csv(result, dataset.categories).encode("utf-8"),
            "curves.png": draw_precision_recall(result),
            "confusion.csv": confusion_csv(matrix).encode("utf-8"),
            "confusion.png": draw_confusion(matrix),
            "images.html": page.encode("utf-8"),
            "evaluation.json": json.dumps(value, indent=1, allow_nan=False).encode("utf-8"),
        }
        for name, data in files.items():
            (out / name).write(data)
        print(title)
        print(told_thresholds(thresholds, state.config.model))
        print(summary(result))
        print(f"\nall numbers: {out / 'evaluation.json'}; beside it {', '.join(n for n in files if '.json' not in n)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def set_thresholds(network: MaskRCNN, model: ModelConfig, options: EvaluateOptions) -> dict[str, Any]:
    """Give the network the command's thresholds, else the checkpoint's; returns them by `ModelConfig`'s names."""
    score = (
        min(model.score_threshold, LOWEST_EVALUATED_SCORE)
        if options.score_threshold is None
        else options.score_threshold
    )
    nms = model.nms_threshold if options.nms_threshold is None else options.nms_threshold
    most = options.detections or model.detections_per_image
    heads = network.roi_heads
    heads.score_thresh, heads.nms_thresh, heads.detections_per_img = score, nms, most
    return {"score_threshold": score, "nms_threshold": nms, "detections_per_image": most}


def told_thresholds(used: dict[str, Any], model: ModelConfig) -> str:
    """One line: what was rated, and where that is not what the checkpoint itself would find."""
    line = (
        f"scores from {used['score_threshold']:g} on, NMS at {used['nms_threshold']:g}, "
        f"at most {counted(used['detections_per_image'], 'detection')} an image"
    )
    changed = [f"{name} {getattr(model, name):g}" for name, value in used.items() if getattr(model, name) != value]
    return line + (f" (the checkpoint's own: {', '.join(changed)})" if changed else "")


def check_classes(known: Sequence[Category], asked: Sequence[Category], checkpoint: str, dataset: str) -> None:
    """Whether a network's classes are the dataset's.

    Raises:
        DatasetError: an id stands for different classes, or one side has a class that the other has not.
    """
    ours, theirs = ({category.id: category.name for category in side} for side in (known, asked))
    for number in sorted(ours.keys() | theirs.keys()):
        if ours.get(number) != theirs.get(number):
            raise DatasetError(
                f"class {number} is {theirs.get(number, 'missing')!r} in {dataset}, and "
                f"{ours.get(number, 'missing')!r} in the checkpoint {checkpoint}: they must have the same classes"
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
    watch: Callable[[EvalBatch, list[Detections]], None] | None = None,
) -> Evaluation | None:
    """Rate the network on every image of a split, shared over the ranks; each of them must call this.

    Args:
        network: on the accelerator's device; its mode is left as it was.
        data, train: `workers`, `read_ahead_mb`, `stall_s`, the cache's options and `eval_batch_size` are read.
        parents: of classes that are kinds of others, for the Open Images AP.
        watch: is shown each batch of this rank with what was found in it.

    Returns:
        The result on the main rank, None on the others.
    """
    from shards.stream.loader import loader
    from shards.stream.streams import EvalStream
    from trainer.data.collate import EvalCollate, sample_cache
    from trainer.metrics.coco import CocoMetric
    from trainer.metrics.openimages import OpenImagesMetric
    from trainer.model.inference import detect

    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    stream = EvalStream(
        dataset,
        split,
        batch_size=train.eval_batch_size,
        rank=rank,
        world=world,
        read_ahead=data.read_ahead_mb * 2**20,
        cache=sample_cache(data),
        stall_s=data.stall_s,
        collate=EvalCollate(),
    )
    coco, open_images = CocoMetric(dataset.categories), OpenImagesMetric(dataset.categories, parents)
    was_training = network.training
    network.eval()
    for batch in loader(stream, workers=data.workers):
        found = detect(network, batch.images, device)
        coco.process(batch.samples, found)
        open_images.process(batch.samples, found)
        if watch is not None:
            watch(batch, found)
    network.train(was_training)

    gather = gather_to_main(accelerator)
    by_coco, by_open_images = coco.evaluate(gather), open_images.evaluate(gather)
    if by_coco is None or by_open_images is None:
        return None
    if by_coco.images != len(dataset.index(split)):
        raise RuntimeError(f"{by_coco.images} images were rated, split {split!r} has {len(dataset.index(split))}")
    return Evaluation(by_coco, by_open_images)


def gather_to_main(accelerator: Accelerator) -> Gather:
    """Joins all ranks' lists on the main one."""
    from accelerate.utils import gather_object

    def gather(items: list[Any]) -> list[Any] | None:
        everything: list[Any] = gather_object(items)
        return everything if accelerator.is_main_process else None

    return gather


if __name__ == "__main__":
    sys.exit(main())
