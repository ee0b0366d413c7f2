"""`build-shards`: cut a training set of images and masks out of Open Images into tar shards.

Only light modules are imported up here: `--help` and a wrong argument must answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from builder.openimages import PUBLIC_ANNOTATIONS, PUBLIC_IMAGES, OpenImages, source_location
from shards.errors import UserError
from shards.storage import Location

if TYPE_CHECKING:
    from builder.build import Summary

DEFAULT_CLASSES = ("Person", "Car", "Traffic light", "Traffic sign")
DEFAULT_OUT = "./shards-data"

_EPILOG = """\
examples:
  build-shards --per-class 1000
      1000 images each with people, cars, traffic lights and traffic signs, to ./shards-data
  build-shards --classes Dog Cat "Guinea pig" --per-class 500 --out s3://bucket/pets
  build-shards --per-class 1000 --splits partition --partition 0.8 0.1 0.1 --out s3://bucket/traffic
  build-shards --per-class 20 --images s3://mirror/images --annotations s3://mirror/openimages --out /data/try

An interrupted build goes on when the same command is given again. S3 endpoints and credentials come from the usual
AWS variables and files (AWS_ENDPOINT_URL, AWS_PROFILE, ...).
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line of `build-shards`."""
    parser = argparse.ArgumentParser(
        prog="build-shards",
        description="Cut a training set of images and instance masks out of Open Images into tar shards.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to take")
    what.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        default=list(DEFAULT_CLASSES),
        help="names (any case; quote names with spaces) or MIDs such as /m/01g317; ids follow this order "
        "(default: Person Car 'Traffic light' 'Traffic sign')",
    )
    what.add_argument("--per-class", type=_positive, required=True, metavar="N", help="train images a class")
    what.add_argument(
        "--eval-per-class",
        type=_not_negative,
        metavar="N",
        help="val images a class, and test images a class; 0 for none (default: a tenth of --per-class)",
    )
    what.add_argument(
        "--exact-classes",
        action="store_true",
        help="leave out the children of a class in the hierarchy (by default a Man counts as a Person)",
    )
    what.add_argument(
        "--splits",
        choices=("official", "partition"),
        default="official",
        help="take val and test from the source's own, or cut all three from its train split (default: official)",
    )
    what.add_argument(
        "--partition",
        type=_fraction,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="the parts of --splits partition (default: 0.8 0.1 0.1)",
    )
    what.add_argument("--seed", type=_not_negative, default=0, metavar="N", help="of the choice and order (default: 0)")
    where = parser.add_argument_group("where from, where to (any fsspec URL or local path)")
    where.add_argument(
        "--images", default=PUBLIC_IMAGES, metavar="URL", help="root of <split>/<ImageID>.jpg (default: %(default)s)"
    )
    where.add_argument(
        "--annotations",
        default=PUBLIC_ANNOTATIONS,
        metavar="URL",
        help="root of the tables and mask zips (default: %(default)s)",
    )
    where.add_argument("--out", default=DEFAULT_OUT, metavar="URL", help="root of the dataset (default: %(default)s)")
    where.add_argument(
        "--anonymous",
        action="store_true",
        help="do not sign S3 requests for images and annotations (the public bucket is always read so)",
    )
    where.add_argument(
        "--overwrite", action="store_true", help="discard another dataset or unfinished build that lies in --out"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--images-per-shard", type=_positive, default=256, metavar="N", help="images a shard (default: %(default)s)"
    )
    how.add_argument(
        "--workers", type=_positive, metavar="N", help="processes; never shows in the result (default: one a CPU)"
    )
    how.add_argument(
        "--cluster",
        default="",
        metavar="tcp://HOST:PORT",
        help="pack on the workers of this Dask scheduler, not on local ones (pip install 'maskstream[cluster]')",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 when the dataset is built, 2 for bad input or a place that cannot be used, 130 for Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.partition and args.splits != "partition":
        parser.error("--partition has no meaning without --splits partition")
    if args.partition and sum(args.partition) <= 0:
        parser.error("--partition: at least one part must be greater than 0")
    logging.basicConfig(level=logging.WARNING, format="build-shards: %(message)s", stream=sys.stderr)
    logging.getLogger("builder").setLevel(logging.INFO)
    try:
        print(render_summary(run(args), args.out))
        return 0
    except UserError as error:
        print(f"build-shards: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build-shards: interrupted: finished shards are kept, give the same command to go on", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> Summary:
    """Build what the parsed arguments ask for; see `builder.build.build` for errors."""
    from builder.build import build
    from builder.executors import Engine
    from builder.prepare import Choice

    a_tenth = max(1, args.per_class // 10)
    choice = Choice(
        classes=tuple(args.classes),
        per_class=args.per_class,
        eval_per_class=a_tenth if args.eval_per_class is None else args.eval_per_class,
        exact=args.exact_classes,
        partition=tuple(args.partition or (0.8, 0.1, 0.1)) if args.splits == "partition" else None,
        seed=args.seed,
        images_per_shard=args.images_per_shard,
    )
    source = OpenImages(
        images=source_location(args.images, anonymous=args.anonymous),
        annotations=source_location(args.annotations, anonymous=args.anonymous),
    )
    return build(
        source,
        choice,
        Location(args.out),
        engine=Engine(args.workers or os.cpu_count() or 1, args.cluster),
        overwrite=args.overwrite,
        command=command_line(args),
    )


def command_line(args: argparse.Namespace) -> str:
    """The command that asks for the same dataset: what decides the bytes, nothing of this one run (workers)."""
    words = ["build-shards", "--classes", *args.classes, "--per-class", str(args.per_class)]
    if args.eval_per_class is not None:
        words += ["--eval-per-class", str(args.eval_per_class)]
    words += ["--exact-classes"] * args.exact_classes
    if args.splits == "partition":
        words += ["--splits", "partition", "--partition", *map(str, args.partition or (0.8, 0.1, 0.1))]
    words += ["--seed", str(args.seed), "--images-per-shard", str(args.images_per_shard)]
    words += ["--images", args.images, "--annotations", args.annotations, "--out", args.out]
    return shlex.join(words)


def render_summary(summary: Summary, out: str) -> str:
    """The table that ends a build."""
    after = f"next: inspect-shards {shlex.quote(out)}"
    if summary.already_built:
        return f"already built: {out} holds exactly this dataset, nothing was done\n{after}"
    chosen = {(report.split, report.name): report for report in summary.chosen}
    width = max(len("class"), *(len(counts.name) for counts in summary.counts))
    lines = [f"{'split':<6} {'class':<{width}} {'asked':>7} {'found':>7} {'images':>7} {'masks':>8} {'boxes':>8}"]
    for counts in summary.counts:
        report = chosen[counts.split, counts.name]
        lines.append(
            f"{counts.split:<6} {counts.name:<{width}} {report.asked:>7} {report.available:>7} {counts.images:>7} "
            f"{counts.masks:>8} {counts.boxes:>8}"
        )
    lines.append("asked: images; found: images at the source that count for the class; images, masks, boxes: packed")
    failures = ", ".join(f"{reason} {count}" for reason, count in summary.failures)
    lines.append(f"not packed: {failures} (see accounts.parquet)" if failures else "not packed: nothing")
    resumed = f", {summary.resumed} of them by an earlier run" if summary.resumed else ""
    lines += [
        f"{summary.samples} images in {summary.shards} shards{resumed}, {summary.nbytes / 1e6:.1f} MB, in {out}",
        f"{summary.fetched / 1e6:.1f} MB of images and masks fetched, {summary.seconds:.1f} s",
        after,
    ]
    return "\n".join(lines)


def _positive(text: str) -> int:
    value = _not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _not_negative(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
