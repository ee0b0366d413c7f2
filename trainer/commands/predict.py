"""Find objects in images: pictures with detections, COCO JSON, and a submission to the Open Images Challenge.

Images are local paths, folders, globs, or any fsspec URLs of these; or a split of a shard dataset, which all ranks
process in parts: the same command again processes the missing parts. Coordinates refer to the pixels as stored: EXIF
orientation is ignored, as in training. See docs/predicting.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from shards.commands.options import add_options, from_arguments
from shards.common.errors import UserError
from shards.common.redact import redact
from shards.common.text import counted
from shards.storage.location import Location, check_writable
from trainer.commands import command_line as command
from trainer.config.command_options import PredictOptions
from trainer.prediction.image_inputs import check_image_ids, file_name, find_images, picture_names, stem
from trainer.prediction.output_files import COCO_FILE, PredictionFiles, image_record, submission_labels, write_picture

if TYPE_CHECKING:
    from torchvision.models.detection import MaskRCNN

    from trainer.model.checkpoint import State
    from trainer.prediction.image_stream import DecodedImage, UnreadableImage
    from trainer.prediction.output_files import Labels

IN_SHARDS = ("data.split", "part-images")  # options that only a dataset has
IMAGES_PER_WORKER = 4  # fewer images are not worth a loader process


def main(arguments: Sequence[str] | None = None, program: str = "predict.py") -> int:
    """Run the command and return its exit status: 1 if an image could not be read and the others were processed."""
    return command.run("predict", lambda: predict(parse(arguments, program)))


def parse(arguments: Sequence[str] | None, program: str = "predict.py") -> PredictOptions:
    """Return the options of a command line; raises UserError for options that cannot be combined."""
    parser = command.Parser(program, "Find objects in images.", usage=f"{program} [options] [IMAGE ...]")
    add_options(parser, PredictOptions)
    given = parser.parse_args(arguments)
    options = from_arguments(PredictOptions, given)
    if bool(options.images) == bool(options.shards):
        raise UserError("give either images or --data.shards")
    for name in IN_SHARDS:
        if hasattr(given, name) and not options.shards:
            raise UserError(f"--{name} needs --data.shards: it has no meaning for images")
    if options.hierarchy and not options.submission:
        raise UserError("--hierarchy needs --submission")
    if options.shards and options.device:
        raise UserError("--device is for images: with --data.shards, accelerate decides (ACCELERATE_USE_CPU=true)")
    if not options.shards and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("images need a single process: start predict without a launcher, or give --data.shards")
    if options.pictures is None:
        options.pictures = not options.shards
    return options


def predict(options: PredictOptions) -> int:
    """Process every image that can be read; return 1 if an image could not be, else 0."""
    command.start_logging()
    if not options.shards:
        return predict_files(options)
    predict_split(options)
    return 0


def predict_split(options: PredictOptions) -> None:
    """Process a split of a dataset, on all ranks together; errors as in `predict`."""
    from shards.format.dataset import open_dataset  # not at the top: --help answers without pyarrow

    dataset = open_dataset(options.shards)
    dataset.index(options.split)  # reports a wrong split before seconds of loading

    from trainer.commands.evaluate import check_classes
    from trainer.model.checkpoint import open_checkpoint
    from trainer.prediction.sharded_inference import predict_shards
    from trainer.run.distributed import main_can_write, start_accelerator

    accelerator = start_accelerator()
    main_can_write(Location(options.out), "--out", accelerator)
    state = open_checkpoint(options.checkpoint)
    # `data.classes` selects classes, not images: all images are processed.
    asked = dataset.select(classes=state.config.data.classes or None).categories
    check_classes(state.categories, asked, options.checkpoint, str(dataset.root))
    network, labels = network_and_labels(options, state)
    network.to(accelerator.device).eval()
    predict_shards(options, dataset, state, network, accelerator, labels)


def predict_files(options: PredictOptions) -> int:
    """Process image files, and report those that cannot be read; the result is that of `predict`."""
    images = find_images(options.images)
    if options.submission:
        check_image_ids(images)
    check_writable(Location(options.out), "--out")

    import torch

    from shards.stream.loader import loader
    from trainer.model.checkpoint import open_checkpoint
    from trainer.prediction.image_stream import ImageStream
    from trainer.prediction.like_batches import detect_in_order

    state = open_checkpoint(options.checkpoint)
    network, labels = network_and_labels(options, state)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        network.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise UserError(f"--device {name}: it cannot be used ({str(error).splitlines()[0]})") from error
    out, names, done = Location(options.out), picture_names(images, options.out), 0
    workers = min(options.workers, len(images) // IMAGES_PER_WORKER, os.cpu_count() or 1)
    batches = loader(ImageStream(images), workers=workers, pin_memory=device.type == "cuda")
    with PredictionFiles(out, state.categories, labels) as files:
        for item, found in detect_in_order(network, readable(batches, images), device, options.batch_size):
            image, name, (height, width) = images[item.number], names[item.number], item.pixels.shape[-2:]
            record = image_record(stem(image), file_name(image), width, height, found)
            if options.pictures:
                record["image"]["picture"] = name
                write_picture(out / name, item.pixels, found, state.categories)
            files.add(record)
            done += 1
            command.say(f"{out / name if options.pictures else image}: {counted(len(found), 'object')}")
    command.say(f"{out / COCO_FILE}: {files.counts()}")
    return 1 if done < len(images) else 0


def readable(items: Iterable[DecodedImage | UnreadableImage], images: Sequence[str]) -> Iterator[DecodedImage]:
    """Yield the images that could be decoded, and report each other one on a line of its own."""
    from trainer.prediction.image_stream import DecodedImage

    for item in items:
        if isinstance(item, DecodedImage):
            yield item
            continue
        image = images[item.number]
        # A storage error already starts with the image's path.
        message = item.reason if item.reason.startswith(f"{image}: ") else f"{image}: {item.reason}"
        print(redact(f"predict: {message}"), file=sys.stderr, flush=True)


def network_and_labels(options: PredictOptions, state: State) -> tuple[MaskRCNN, Labels | None]:
    """Return a checkpoint's network with the threshold of --score, and the labels of a submission, if there is one."""
    from trainer.metrics.hierarchy import read_parents
    from trainer.model.build import rebuild

    labels = None
    if options.submission:
        parents = read_parents(Location(options.hierarchy), state.categories) if options.hierarchy else {}
        labels = submission_labels(state.categories, parents)
    network = rebuild(state)
    network.roi_heads.score_thresh = options.score
    return network, labels


if __name__ == "__main__":
    sys.exit(main())
