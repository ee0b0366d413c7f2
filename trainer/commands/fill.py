"""Predict masks for the objects of a dataset that have a box only, and write a dataset with them.

Images, and masks of the source, stay as they are. All ranks share the shards; the same command again writes the missing
ones. See docs/predicting.md.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shards.commands.options import add_options, from_arguments
from shards.common.errors import UserError
from shards.common.redact import redact_values
from shards.common.text import counted
from shards.storage.location import Location
from trainer.commands import command_line as command
from trainer.config.command_options import FillOptions

if TYPE_CHECKING:
    from shards.format.dataset import Dataset
    from trainer.model.checkpoint import State
    from trainer.prediction.filled_dataset import FilledDataset

VERSION = 1  # of what else determines the bytes

log = logging.getLogger("trainer.commands.fill")


def main(arguments: Sequence[str] | None = None, program: str = "fill.py") -> int:
    """Run the command and return its exit status."""
    return command.run("fill", lambda: fill(parse(arguments, program)))


def parse(arguments: Sequence[str] | None, program: str = "fill.py") -> FillOptions:
    """Return the options of a command line; raises UserError if the result would replace the dataset."""
    parser = command.Parser(program, "Predict masks for the objects of a dataset that have a box only.")
    add_options(parser, FillOptions)
    options = from_arguments(FillOptions, parser.parse_args(arguments))
    if _place(options.out) == _place(options.shards):
        raise UserError(f"--out is {options.out}, which is --data.shards: give a folder for the new dataset")
    return options


def _place(url: str) -> tuple[str, str]:
    """Return what is equal for all spellings of a place."""
    place = Location(url)
    return ("file", os.path.realpath(place.path)) if place.is_local else (place.protocol, place.path)


def fill(options: FillOptions) -> None:
    """Fill the dataset, and print what was predicted; UserError if the inputs do not fit together."""
    command.start_logging()

    from shards.format.dataset import open_dataset  # not at the top: --help answers without pyarrow

    dataset = open_dataset(options.shards)
    for split in options.splits:
        dataset.index(split)  # reports a wrong split before seconds of loading

    from trainer.commands.evaluate import check_classes
    from trainer.model.build import rebuild
    from trainer.model.checkpoint import open_checkpoint
    from trainer.prediction.shard_filling import MaskPredictor, fill_shards
    from trainer.run.distributed import from_main, main_can_write, on_main, start_accelerator
    from trainer.step.box_terms import WIDER

    accelerator = start_accelerator()
    main_can_write(Location(options.out), "--out", accelerator)
    state = open_checkpoint(options.checkpoint)
    asked = dataset.select(classes=state.config.data.classes or None).categories
    check_classes(state.categories, asked, options.checkpoint, str(dataset.root))
    classes, target = predicted_classes(state, dataset), target_of(options, dataset, state)
    on_main(target.claim, accelerator)
    if from_main(target.is_complete() if accelerator.is_main_process else None):
        if accelerator.is_main_process:
            command.say(f"{target.out}: complete already, with masks by {target.about['run']}")
        return
    network = rebuild(state).to(accelerator.device).eval()
    # Boxes trained the mask head in wider RoIs.
    margin = WIDER if state.config.loss.unmasked == "masks" else 0.0
    predictor = MaskPredictor(network, classes, target.about["run"], margin)
    found = fill_shards(options, target, predictor, state.config.data, accelerator)
    if found is not None:
        names = {category.id: category.name for category in dataset.categories}
        each = ", ".join(f"{count} {names[number]}" for number, count in sorted(found.masks.items())) or "none"
        masks = f"{counted(found.masks.total(), 'mask')} predicted ({each}), mean score {found.mean:.2f}"
        of = f"{counted(found.boxes, 'object')} of {' and '.join(target.splits)} with a box only"
        command.say(f"{target.out}: {of}, {masks}")


def target_of(options: FillOptions, dataset: Dataset, state: State) -> FilledDataset:
    """Return the dataset that is to be written."""
    from shards.format.dataset import SPLITS
    from trainer.prediction.filled_dataset import FilledDataset
    from trainer.prediction.sharded_inference import inference_key

    splits = tuple(split for split in SPLITS if split in options.splits)
    run = Location(state.config.run.dir).url.rpartition("/")[2]
    about = {
        "run": f"{run}, step {state.step}",
        "split": list(splits),
        "score": options.score,
        "batch-size": options.batch_size,
    }
    key = inference_key(["fill", VERSION, about], dataset, state)
    places = redact_values({"checkpoint": options.checkpoint, "dataset": str(dataset.root)})
    return FilledDataset(dataset, Location(options.out), key, splits, {**about, **places})


def predicted_classes(state: State, dataset: Dataset) -> frozenset[int]:
    """Return the ids of the classes that get masks; UserError if there are none.

    With a mask head per class that did not learn masks from boxes, these are the ones that have a mask in the dataset,
    and the others are logged.
    """
    known, config = frozenset(category.id for category in state.categories), state.config
    if config.model.mask_head == "agnostic" or config.loss.unmasked == "masks":
        return known
    indexes = [dataset.index(split) for split in dataset.splits]
    counts = [index.counts(column, state.categories) for index in indexes for column in ("masks", "predicted")]
    unlearned = {number for number in known if not any(of_split[number] for of_split in counts)}
    if unlearned:
        names = ", ".join(category.name for category in state.categories if category.id in unlearned)
        text = (
            f"no mask of {names} in {dataset.root}, and the checkpoint has a mask head per class: their objects keep "
            "a box only; train with --model.mask_head agnostic or --loss.unmasked masks to fill them"
        )
        if unlearned == known:
            raise UserError(text)
        log.warning("%s", text)
    return known - unlearned


if __name__ == "__main__":
    sys.exit(main())
