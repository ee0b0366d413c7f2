"""The command `maskstream export`: write a shard dataset in a format that other trainers read.

With `--to onnx` the command `maskstream` writes a model instead, which is no business of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shards.commands.command_line import Parser, run, say
from shards.commands.options import add_options, from_arguments, option
from shards.common.errors import UserError
from shards.common.text import counted, printable

if TYPE_CHECKING:
    from shards.export.export import Export, Tally

_EPILOG = """\
formats:
  coco    COCO's instances JSON and images; `build-shards --source coco` builds the same dataset from them
  yolo    images, labels with polygons, and data.yaml for Ultralytics
  rfdetr  tar shards for RF-DETR (dataset_file="webdataset")
  folder  images, a PNG per mask, and objects.csv
  onnx    not a dataset: the model of a run; see `maskstream export --to onnx --help`

examples:
  maskstream export s3://bucket/traffic --to coco --out traffic-coco
  maskstream export s3://bucket/traffic --to yolo --out traffic-yolo --split train val --classes Person Car

The same command again writes the same files. What a format cannot hold is counted at the end. See docs/exporting.md.

exit status: 0; 2 with a one-line error; 130 if interrupted
"""


@dataclass
class ExportOptions:
    """Options of `maskstream export`."""

    root: str = option(
        "", "the dataset: s3://bucket/prefix, a local path, any fsspec URL", positional=True, metavar="DATASET"
    )
    to: Literal["coco", "yolo", "rfdetr", "folder", "onnx"] = option("", "format to write", required=True)
    out: str = option(
        "",
        "local folder to write to: a new one, an empty one, or that of the same export",
        metavar="DIR",
        required=True,
    )
    split: list[str] = option([], "splits to write", metavar="SPLIT", default_help="all")
    classes: list[str] = option(
        [], "names, MIDs or ids: images that have one of them, with their objects", metavar="CLASS", default_help="all"
    )
    fraction: float = option(1.0, "share of the images, chosen by a hash of --seed", low=0, high=1)
    seed: int = option(0, "seed of the choice of images", low=0)
    masks_only: bool = option(False, "leave out objects without a mask")
    shard_mb: int = option(100, "MiB at which a tar is closed, for --to rfdetr", low=1)
    anonymous: bool = option(False, "do not sign S3 requests (public buckets)")


def make_parser(program: str = "maskstream export") -> Parser:
    """Return the parser of `maskstream export`."""
    parser = Parser(
        prog=program,
        description="Write a shard dataset, or a part of it, in a format that other trainers read.",
        epilog=_EPILOG,
        usage=f"{program} [options] DATASET --to FORMAT --out DIR",
    )
    add_options(parser, ExportOptions)
    return parser


def main(argv: Sequence[str] | None = None, program: str = "maskstream export") -> int:
    """Run the command and return its exit status."""
    parser = make_parser(program)
    return run("export", lambda: _run(from_arguments(ExportOptions, parser.parse_args(argv))), show=printable)


def _run(options: ExportOptions) -> int:
    # Not at the top: --help answers without pyarrow, whose import takes longer than all else.
    if options.to == "onnx":
        raise UserError("--to onnx writes the model of a run: maskstream export CHECKPOINT --to onnx --out FILE")
    from shards.export import coco, folder, rfdetr, yolo
    from shards.export.export import Tally, claim
    from shards.storage.explain import storage_errors

    export = _export_of(options)
    module = {"coco": coco, "yolo": yolo, "rfdetr": rfdetr, "folder": folder}[options.to]
    tallies = [Tally(split) for split in options.split or export.dataset.splits]
    with storage_errors(str(export.out)):
        for tally in tallies:
            export.dataset.index(tally.split)  # an unknown split is an error before anything is written
        claim(export)
        for tally in tallies:
            module.write_split(export, tally)
            say("\n".join(_summary(tally)))
        say(f"next: {module.next_step(export, tallies)}")
    return 0


def _export_of(options: ExportOptions) -> Export:
    from shards.export.export import Export
    from shards.format.dataset import open_dataset
    from shards.storage.location import Location, check_writable

    out = Location(options.out)
    if not out.is_local:
        raise UserError(f"--out is {options.out}: other trainers read files: give a local folder")
    check_writable(out, "--out")
    dataset = open_dataset(Location(options.root, anonymous=options.anonymous))
    chosen = dataset.select(classes=options.classes or None, fraction=options.fraction, seed=options.seed)
    return Export(chosen, Path(out.path), options.to, options.masks_only, options.shard_mb * 2**20)


def _summary(tally: Tally) -> list[str]:
    """Return the lines that report a split."""
    empty = f", {tally.empty} of them without an object" if tally.empty else ""
    lines = [f"{tally.split}: {counted(tally.images, 'image')}{empty}, {counted(tally.objects, 'object')}"]
    return lines + [f"  {text}: {number}" for text, number in tally.remarks.items() if number]
