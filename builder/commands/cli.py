"""`build-shards`: cut a training set of images and masks out of Open Images into tar shards.

Only light modules are imported up here: `--help` and a wrong argument must answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from builder.commands.yaml_options import with_config
from builder.fetching.cache_folder import default_cache_folder
from builder.sources.openimages.layout import PUBLIC_ANNOTATIONS, PUBLIC_IMAGES, source_location
from shards.common.errors import UserError
from shards.common.output import print_to_reader
from shards.common.redact import redact
from shards.storage.location import Location

if TYPE_CHECKING:
    from builder.commands.build import Summary
    from builder.commands.dry_run import Estimate
    from builder.sources.base import Source

DEFAULT_CLASSES = ("Person", "Car", "Traffic light", "Traffic sign")  # of Open Images
DEFAULT_OUT = "./shards-data"
SHORT = 3  # exit code

_EPILOG = """\
examples:
  build-shards --per-class 1000
      1000 images each with people, cars, traffic lights and traffic signs, to ./shards-data
  build-shards --classes Dog Cat "Guinea pig" --per-class 500 --out s3://bucket/pets
  build-shards --per-class 1000 --splits partition --partition 0.8 0.1 0.1 --out s3://bucket/traffic
  build-shards --classes Dog --per-class 200 --require-mask --min-predicted-iou 0.8 --drop depiction,inside
  build-shards --images-list ids.txt --all-annotations
  build-shards --source coco --images s3://bucket/train2017 --annotations instances_train2017.json --classes person car
  build-shards --per-class 20 --images s3://mirror/images --annotations s3://mirror/openimages --out /data/try
  build-shards --per-class 1000 --dry-run
      what that would pack, fetch and cost, before anything is fetched
  build-shards --config traffic.yaml --retry-failed
      with the options of a file; what could not be had is tried again

exit codes:
  0    the dataset is finished, and every image that failed was replaced by another of its class (a mask that fails
       leaves its object as a box, and does not show here)
  2    bad input, or a place that cannot be reached, read or written
  3    the dataset is finished and can be used, but images failed and nothing was left to replace them: a class has
       less than was asked for and than there is, or listed images are missing. --retry-failed may help. (Where the
       source itself has less of a class than was asked for, the table says so, and the code is 0)
  130  interrupted by Ctrl-C

An interrupted or killed build goes on when the same command is given again. One build works in a place at a time: a
lock beside the shards says which. That of a build that died on this machine counts for nothing, that of one on another
machine for ten minutes. S3 endpoints and credentials come from the usual AWS variables and files (AWS_ENDPOINT_URL,
AWS_PROFILE, ...), and are never printed or stored.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line of `build-shards`."""
    parser = argparse.ArgumentParser(
        prog="build-shards",
        description="Cut a training set of images and instance masks out of Open Images or COCO files into tar shards.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_what_to_take(parser)
    where = parser.add_argument_group("where from, where to (any fsspec URL or local path)")
    where.add_argument(
        "--images",
        default=PUBLIC_IMAGES,
        metavar="URL",
        help="root of <split>/<ImageID>.jpg (default: %(default)s), or of coco's file names",
    )
    where.add_argument(
        "--annotations",
        nargs="+",
        default=[PUBLIC_ANNOTATIONS],
        metavar="URL",
        help=f"root of the tables and mask zips (default: {PUBLIC_ANNOTATIONS}); or coco's instances JSON, or several "
        "as train=URL val=URL test=URL",
    )
    where.add_argument("--out", default=DEFAULT_OUT, metavar="URL", help="root of the dataset (default: %(default)s)")
    where.add_argument(
        "--anonymous",
        action="store_true",
        help="do not sign S3 requests for images and annotations (the public bucket is always read so)",
    )
    cache = parser.add_argument_group("cache").add_mutually_exclusive_group()
    cache.add_argument(
        "--cache",
        default=default_cache_folder(),
        metavar="DIR",
        help="keep annotation tables and zip directories there, as Parquet, and read them there while the source stays "
        "the same; about 1 GB for all of Open Images; may be deleted at any time (default: %(default)s)",
    )
    cache.add_argument("--no-cache", action="store_true", help="read everything anew, and keep nothing after the run")
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
    how.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file with any of these options by their names (per-class: 1000); what is given here as well wins",
    )
    how.add_argument("--json", action="store_true", help="print the result as one JSON object")
    other = parser.add_argument_group("instead of a plain build").add_mutually_exclusive_group()
    other.add_argument(
        "--dry-run",
        action="store_true",
        help="read tables and zip directories, print what would be packed and fetched, and write nothing to --out",
    )
    other.add_argument(
        "--retry-failed",
        action="store_true",
        help="of the finished dataset of this command, fetch again only what could not be had, and rewrite only the "
        "shards concerned",
    )
    other.add_argument(
        "--overwrite", action="store_true", help="discard another dataset or unfinished build that lies in --out"
    )
    return parser


def _add_what_to_take(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to take")
    what.add_argument(
        "--source",
        choices=("open-images", "coco"),
        default="open-images",
        help="what --images and --annotations hold (default: open-images)",
    )
    what.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="names (any case; quote names with spaces) or MIDs such as /m/01g317; ids follow this order "
        "(default: Person Car 'Traffic light' 'Traffic sign'; of coco, all categories)",
    )
    what.add_argument(
        "--per-class",
        type=_positive,
        metavar="N",
        help="train images a class: those with masks of it first, others where these run out (default: of coco, all)",
    )
    what.add_argument(
        "--eval-per-class",
        type=_not_negative,
        metavar="N",
        help="val images a class, and test images a class; 0 for none (default: a tenth of --per-class)",
    )
    what.add_argument(
        "--images-list",
        default="",
        metavar="URL",
        help="instead of --per-class: a file of the images to take, one ImageID a line, or train/ImageID",
    )
    what.add_argument(
        "--exact-classes",
        action="store_true",
        help="leave out the children of a class in the hierarchy (by default a Man counts as a Person)",
    )
    what.add_argument(
        "--all-annotations",
        action="store_true",
        help="keep the annotations of all other classes too; their ids follow in the order of their names",
    )
    what.add_argument(
        "--require-mask",
        action="store_true",
        help="count only images with a mask of the class, never those with boxes only",
    )
    what.add_argument(
        "--min-predicted-iou",
        type=_fraction,
        default=0.0,
        metavar="X",
        help="leave out masks that the source itself estimates to be worse; their objects stay as boxes",
    )
    what.add_argument(
        "--drop",
        type=_flags,
        default=(),
        metavar="FLAG,...",
        help="leave out annotations with any of these flags: depiction, inside, truncated, occluded, group-of",
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit codes are those of `--help`."""
    return print_to_reader(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    try:
        args = parser.parse_args(with_config(parser, sys.argv[1:] if argv is None else argv))
        _check_what_to_take(parser, args)
        _start_logging()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to say Ctrl-C
        with _cache_folder(args) as args.cache:
            result = run(args)
        print(_render(result, args))
        return SHORT if getattr(result, "shortfalls", ()) else 0
    except UserError as error:
        print(f"build-shards: error: {redact(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build-shards: interrupted: finished shards are kept, give the same command to go on", file=sys.stderr)
        return 130


@contextmanager
def _cache_folder(args: argparse.Namespace) -> Iterator[str]:
    """--cache; with --no-cache a folder for this run alone, because choosing and describing images read the same."""
    if args.no_cache:
        with tempfile.TemporaryDirectory(prefix="maskstream-", ignore_cleanup_errors=True) as folder:
            yield folder
    else:
        yield os.path.abspath(os.path.expanduser(args.cache))


class _Redacting(logging.Formatter):
    """Messages may hold URLs, and these credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _start_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("build-shards: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("builder").setLevel(logging.INFO)


def _render(result: Summary | Estimate, args: argparse.Namespace) -> str:
    from builder.commands.build import Summary
    from builder.commands.summary import render_estimate, render_summary, to_json

    if args.json:
        return to_json(result, args.out)
    return render_summary(result, args.out) if isinstance(result, Summary) else render_estimate(result, args.out)


def _check_what_to_take(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Arguments that do not go together."""
    if args.partition and args.splits != "partition":
        parser.error("--partition has no meaning without --splits partition")
    if args.partition and sum(args.partition) <= 0:
        parser.error("--partition: at least one part must be greater than 0")
    coco = args.source == "coco"
    if coco and (args.images == PUBLIC_IMAGES or args.annotations == [PUBLIC_ANNOTATIONS]):
        parser.error("--source coco needs --images (the root of its files) and --annotations (its instances JSON)")
    if not coco and len(args.annotations) > 1:
        parser.error("--annotations takes one root; several files are for --source coco")
    if coco and args.splits == "partition" and len(args.annotations) > 1:
        parser.error("--splits partition cuts one instances file: give --annotations one")
    if args.images_list and (args.per_class or args.eval_per_class is not None):
        parser.error("--images-list says which images to take: leave out --per-class and --eval-per-class")
    if not (coco or args.images_list or args.per_class):
        parser.error("--per-class N is needed: how many train images a class (or --images-list)")


def run(args: argparse.Namespace) -> Summary | Estimate:
    """Do what the parsed arguments ask for; see `builder.commands.build.build` for errors."""
    from builder.commands.build import begin, build
    from builder.commands.dry_run import estimate
    from builder.commands.retry_failed import retry_failed
    from builder.packing.executors import Engine
    from builder.planning.image_list import ImageList
    from builder.planning.prepare import prepare
    from builder.planning.selection import Quotas
    from builder.sources.base import Filters

    eval_per_class = args.eval_per_class
    if eval_per_class is None and args.per_class:
        eval_per_class = max(1, args.per_class // 10)
    source = make_source(args)
    make_plan = partial(
        prepare,
        source,
        tuple(args.classes or (() if args.source == "coco" else DEFAULT_CLASSES)),
        ImageList(args.images_list) if args.images_list else Quotas(args.per_class, eval_per_class),
        exact_classes=args.exact_classes,
        all_annotations=args.all_annotations,
        filters=Filters(args.min_predicted_iou, args.drop, args.require_mask),
        partition=tuple(args.partition or (0.8, 0.1, 0.1)) if args.splits == "partition" else None,
        seed=args.seed,
        images_per_shard=args.images_per_shard,
    )
    workers = 1 if args.dry_run else args.workers or os.cpu_count() or 1
    engine = Engine(workers, args.cluster)
    begun = begin(source, Location(args.out), make_plan, engine=engine, writes=not args.dry_run)
    if args.dry_run:
        return estimate(begun)
    if args.retry_failed:
        return retry_failed(begun, command=command_line(args))
    return build(begun, overwrite=args.overwrite, command=command_line(args))


def make_source(args: argparse.Namespace) -> Source:
    """Where the arguments say that images and annotations lie."""
    images = source_location(args.images, anonymous=args.anonymous)
    if args.source == "coco":
        from builder.sources.coco import Coco, parse_places

        places, named = parse_places(args.annotations)
        files = tuple((split, source_location(url, anonymous=args.anonymous)) for split, url in places)
        return Coco(images, files, named)
    from builder.fetching.table_cache import Cache
    from builder.sources.openimages.source import OpenImages

    return OpenImages(
        images=images,
        annotations=source_location(args.annotations[0], anonymous=args.anonymous),
        cache=Cache(args.cache),
    )


def command_line(args: argparse.Namespace) -> str:
    """The command that asks for the same dataset: what decides the bytes, nothing of this one run (workers)."""
    words = ["build-shards"]
    words += ["--source", args.source] * (args.source != "open-images")
    classes = args.classes or (() if args.source == "coco" else DEFAULT_CLASSES)
    words += ["--classes", *classes] if classes else []
    words += ["--per-class", str(args.per_class)] if args.per_class else []
    words += ["--images-list", args.images_list] if args.images_list else []
    if args.eval_per_class is not None:
        words += ["--eval-per-class", str(args.eval_per_class)]
    words += ["--exact-classes"] * args.exact_classes
    words += ["--all-annotations"] * args.all_annotations
    words += ["--require-mask"] * args.require_mask
    words += ["--min-predicted-iou", str(args.min_predicted_iou)] if args.min_predicted_iou else []
    words += ["--drop", ",".join(args.drop)] if args.drop else []
    if args.splits == "partition":
        words += ["--splits", "partition", "--partition", *map(str, args.partition or (0.8, 0.1, 0.1))]
    words += ["--seed", str(args.seed), "--images-per-shard", str(args.images_per_shard)]
    words += ["--images", args.images, "--annotations", *args.annotations, "--out", args.out]
    return shlex.join(words)


def _positive(text: str) -> int:
    value = _not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _not_negative(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _flags(text: str) -> tuple[str, ...]:
    known = ("depiction", "inside", "truncated", "occluded", "group-of")
    found = tuple(sorted({name.strip() for name in text.split(",")}))
    for name in found:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
    return found


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
