"""Rate a checkpoint on a split of a shard dataset: COCO's box and mask AP.

    accelerate launch trainer/evaluate.py --checkpoint runs/traffic --data.shards s3://bucket/prefix --data.split val

Every image is rated once, whatever the number of processes. A table is printed, and --out takes all numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shards.dataset import Category, Dataset, open_dataset
from shards.errors import DatasetError, UserError
from shards.storage import Location
from trainer import command
from trainer.ranks import start_accelerator
from trainer.settings import DataConfig, TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torchvision.models.detection import MaskRCNN

    from trainer.data import EvalBatch
    from trainer.detect import Detections
    from trainer.metrics.coco import CocoResult

log = logging.getLogger("trainer.evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return command.run("evaluate", lambda: evaluate_checkpoint(parse(arguments)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: a wrong argument.
    """
    data, train = DataConfig(), TrainConfig()
    parser = command.Parser(prog="evaluate.py", description="Rate a checkpoint: COCO's box and mask AP.")
    parser.add_argument("--checkpoint", required=True, metavar="URL", help="a run's folder, or one checkpoint's")
    parser.add_argument("--data.shards", dest="shards", metavar="URL", help="shard dataset [the one of the training]")
    parser.add_argument("--data.split", dest="split", default="val", metavar="NAME", help="split to rate [val]")
    parser.add_argument(
        "--data.workers",
        dest="workers",
        type=int,
        default=data.workers,
        metavar="N",
        help=f"loader processes of each rank [{data.workers}]",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=train.eval_batch_size,
        metavar="N",
        help=f"images a batch on each rank [{train.eval_batch_size}]",
    )
    parser.add_argument(
        "--out", metavar="URL", help="JSON file for all numbers [evaluation-SPLIT.json in --checkpoint]"
    )
    parsed: argparse.Namespace = parser.parse_args(arguments)
    for name in ("workers", "batch_size"):
        if getattr(parsed, name) < (name == "batch_size"):
            raise UserError(f"{name} is {getattr(parsed, name)}: it must be at least {int(name == 'batch_size')}")
    return parsed


def evaluate_checkpoint(options: argparse.Namespace) -> None:
    """Rate what `--checkpoint` names; print the table and write the JSON file.

    Raises:
        UserError: checkpoint or dataset cannot be had, or do not go together.
    """
    command.start_logging()
    dataset = open_dataset(options.shards) if options.shards else None
    if dataset is not None:
        dataset.index(options.split)  # a wrong split is told before seconds of loading

    from trainer.checkpoint import open_checkpoint
    from trainer.model import rebuild

    state = open_checkpoint(options.checkpoint)
    dataset = (dataset or open_dataset(state.config.data.shards)).select(classes=state.config.data.classes)
    check_classes(state.categories, dataset.categories, options.checkpoint, str(dataset.root))
    accelerator = start_accelerator()
    network = rebuild(state)
    network.to(accelerator.device)
    state.config.data.cache_dir = ""  # of the machine that trained
    state.config.data.workers, state.config.train.eval_batch_size = options.workers, options.batch_size
    result = evaluate(network, dataset, options.split, accelerator, state.config.data, state.config.train)
    if result is not None:
        out = (
            Location(options.out) if options.out else Location(options.checkpoint) / f"evaluation-{options.split}.json"
        )
        value = {
            "checkpoint": options.checkpoint,
            "step": state.step,
            "shards": str(dataset.root),
            "split": options.split,
            **result.to_json(),
        }
        out.write(json.dumps(value, indent=1).encode("utf-8"))
        print(f"{options.checkpoint}, step {state.step}, on {options.split} of {dataset.root}")
        print(summary(result))
        print(f"all numbers: {out}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


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
    watch: Callable[[EvalBatch, list[Detections]], None] | None = None,
) -> CocoResult | None:
    """Rate the network on every image of a split, shared over the ranks; each of them must call this.

    Args:
        network: on the accelerator's device; its mode is left as it was.
        data, train: `workers`, `read_ahead_mb`, `stall_s`, the cache's options and `eval_batch_size` are read.
        watch: is shown each batch of this rank with what was found in it.

    Returns:
        The result on the main rank, None on the others.
    """
    from accelerate.utils import gather_object

    from shards.loader import loader
    from shards.stream import EvalStream
    from trainer.data import EvalCollate, sample_cache
    from trainer.detect import detect
    from trainer.metrics.coco import CocoMetric

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
    metric = CocoMetric(dataset.categories)
    was_training = network.training
    network.eval()
    for batch in loader(stream, workers=data.workers):
        found = detect(network, batch.images, device)
        metric.process(batch.samples, found)
        if watch is not None:
            watch(batch, found)
    network.train(was_training)

    def gather(items: list[Any]) -> list[Any] | None:
        everything: list[Any] = gather_object(items)
        return everything if accelerator.is_main_process else None

    result = metric.evaluate(gather)
    if result is not None and result.images != len(dataset.index(split)):
        raise RuntimeError(f"{result.images} images were rated, split {split!r} has {len(dataset.index(split))}")
    return result


def summary(result: CocoResult) -> str:
    """The result as a table for people, in per cent."""
    lines = [
        f"{result.images} images, {result.boxes} objects, {result.masks} with a mask, {result.detections} detections"
    ]
    columns = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")
    titles = ("AP", "AP50", "AP75", "small", "medium", "large", "AR100")
    lines.append(f"{'':<16}" + "".join(f"{title:>8}" for title in titles))
    for name, scores in (("boxes", result.bbox), ("masks", result.segm)):
        lines.append(f"{name:<16}" + "".join(_percent(getattr(scores, column)) for column in columns))
    lines.append(f"{'class':<16}" + "".join(f"{title:>10}" for title in ("box AP", "box AP50", "mask AP", "mask AP50")))
    for box, mask in zip(result.bbox.classes, result.segm.classes, strict=True):
        lines.append(f"{box.name:<16}" + "".join(_percent(v, 10) for v in (box.ap, box.ap50, mask.ap, mask.ap50)))
    if result.masks < result.boxes:
        lines.append("mask AP counts detections of objects without a mask as errors, even where they are right")
    return "\n".join(lines)


def _percent(value: float | None, width: int = 8) -> str:
    return f"{'-' if value is None else format(100 * value, '.1f'):>{width}}"


if __name__ == "__main__":
    sys.exit(main())
