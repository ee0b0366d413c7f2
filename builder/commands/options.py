"""The options of `build-shards`. Only light modules are imported, because `--help` must be quick."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from builder.sources.openimages.layout import PUBLIC_ANNOTATIONS, PUBLIC_IMAGES
from shards.commands.command_line import Parser
from shards.commands.options import (
    ConfigError,
    add_options,
    check,
    entries,
    option,
    set_from_arguments,
    set_from_yaml,
    to_words,
)
from shards.common.errors import StorageError
from shards.common.redact import redact_url
from shards.storage.location import Location

DEFAULT_CLASSES = ["Person", "Car", "Traffic light", "Traffic sign"]  # of Open Images
DEFAULT_PARTITION = (0.8, 0.1, 0.1)

# Groups of options in the help. At most one option of an exclusive group can be given.
_select = partial(option, group="what to pack")
_place = partial(option, group="sources and target (any fsspec URL or local path)", metavar="URL")
_caching = partial(option, group="cache", exclusive="cache")
_execution = partial(option, group="execution")
_action = partial(option, group="instead of a plain build", exclusive="action")

_EPILOG = """\
examples:
  build-shards --per-class 1000
      1000 images each of people, cars, traffic lights and traffic signs, to ./shards-data
  build-shards --classes Dog Cat "Guinea pig" --per-class 500 --out s3://bucket/pets
  build-shards --per-class 1000 --splits partition --partition 0.8 0.1 0.1 --out s3://bucket/traffic
  build-shards --classes Dog --per-class 200 --require-mask --min-predicted-iou 0.8 --drop depiction,inside
  build-shards --images-list ids.txt --all-annotations
  build-shards --source coco --images s3://bucket/train2017 --annotations instances_train2017.json --classes person car
  build-shards --source yolo --annotations street/data.yaml
  build-shards --source masks --images PNGImages --annotations PedMasks --class-name person
  build-shards --per-class 20 --images s3://mirror/images --annotations s3://mirror/openimages --out /data/try
  build-shards --list-classes
      print the 600 classes, with images, masks and boxes per split: 250 of them have no mask
  build-shards --per-class 1000 --dry-run
      print what would be packed and fetched, before any image is fetched
  build-shards --config traffic.yaml --retry-failed
      read options from a file, and fetch the images and masks that failed again

exit codes:
  0    the dataset is finished, and every image that failed was replaced by another image of its class (a failed mask
       leaves its object with a box, and does not change the exit code)
  2    bad input, or a location that cannot be reached, read or written
  3    the dataset is finished and usable, but images failed and no replacements were left: a class has fewer images
       than requested and than the source has, or listed images are missing. --retry-failed may help. (If the source
       itself has fewer images of a class than requested, the table says so and the exit code is 0)
  130  interrupted by Ctrl-C

To resume an interrupted or killed build, run the same command again. Only one build can run in a location at a time: a
lock next to the shards marks a running build. The lock of a build that died on this machine is ignored, that of a build
on another machine or in another container expires ten minutes after its last heartbeat. S3 endpoints and credentials
come from the usual AWS variables and files (AWS_ENDPOINT_URL, AWS_PROFILE, ...) and are never printed or stored.
"""


def default_cache_folder() -> str:
    """`$XDG_CACHE_HOME/maskstream` or `~/.cache/maskstream` (https://specifications.freedesktop.org/basedir-spec/)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative path.
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "maskstream")


@dataclass
class BuildOptions:
    """Options of `build-shards`. Those that determine the dataset come first, in the order of the recorded command."""

    source: Literal["open-images", "coco", "lvis", "masks", "yolo"] = _select(
        "open-images", "format of --images and --annotations; masks: folders of PNGs, yolo: Ultralytics' layout"
    )
    classes: list[str] = _select(
        [],
        "names (case-insensitive; quote names with spaces) or MIDs such as /m/01g317; class ids follow this order",
        metavar="CLASS",
        default_help=f"{shlex.join(DEFAULT_CLASSES)}; with other sources, all classes",
    )
    per_class: int | None = _select(
        None,
        "train images per class, those with a mask of it first",
        low=1,
        default_help="with other sources than open-images, all images",
    )
    images_list: str = _select(
        "", "pack the images of this file instead of --per-class: one ImageID or train/ImageID per line", metavar="URL"
    )
    eval_per_class: int | None = _select(
        None, "val and test images per class, each; 0 for neither split", low=0, default_help="a tenth of --per-class"
    )
    exact_classes: bool = _select(False, "ignore the children of a class (by default, a Man counts as a Person)")
    all_annotations: bool = _select(False, "keep all other classes as well; their ids follow in alphabetical order")
    keep_empty: bool = _select(
        False,
        "not with open-images, nor --per-class: also pack the images without an object of the classes, as background",
    )
    require_mask: bool = _select(False, "count only images with a mask of the class, not images with boxes only")
    min_predicted_iou: float = _select(
        0.0, "omit masks whose quality the source estimates to be lower; their objects keep their boxes", low=0, high=1
    )
    drop: list[Literal["depiction", "inside", "truncated", "occluded", "group-of"]] = _select(
        [],
        "omit annotations with any of these flags: depiction, inside, truncated, occluded, group-of",
        metavar="FLAG,...",
        commas=True,
    )
    splits: Literal["official", "partition"] = _select(
        "official", "use the source's own val and test splits, or cut all three from its train split"
    )
    partition: tuple[float, float, float] | None = _select(
        None,
        "shares of train, val and test with --splits partition; divided by their sum",
        default_help=" ".join(map(str, DEFAULT_PARTITION)),
        low=0,
        high=1,
        metavar=("TRAIN", "VAL", "TEST"),
    )
    seed: int = _select(0, "seed of the selection and of the order of the images", low=0)
    images_per_shard: int = _select(256, "images per shard", low=1)
    to_jpeg: int | None = _select(
        None,
        "convert images that are not JPEGs (PNG, WebP, BMP, TIFF, GIF) to JPEGs of this quality; 95 is high",
        default_help="PNGs are stored as they are, the others are not packed",
        metavar="QUALITY",
        low=1,
        high=100,
    )
    images: list[str] = _place(
        [PUBLIC_IMAGES],
        "root of <split>/<ImageID>.jpg; else of the files, or several as train=URL val=URL test=URL",
    )
    annotations: list[str] = _place(
        [PUBLIC_ANNOTATIONS],
        "root of the tables and mask zips; coco and lvis: the JSON file; masks: the folder or table of masks (of these "
        "three also several, as train=URL val=URL test=URL); yolo: data.yaml",
    )
    class_name: str = _place("", "with masks, unless in a table: the class of all objects", metavar="NAME")
    out: str = _place("./shards-data", "root of the dataset")
    anonymous: bool = _place(False, "do not sign requests for sources (those to the public bucket are never signed)")
    cache: str = _caching(
        default_cache_folder,
        "folder that keeps annotation tables (as Parquet) and zip directories for later builds from the same source: "
        "about 1 GB for all of Open Images, and up to 2.3 GB more during a download; may be deleted at any time",
        metavar="DIR",
    )
    no_cache: bool = _caching(False, "read everything from the source, and keep nothing after the run")
    workers: int | None = _execution(
        None, "processes; their number does not change the dataset", default_help="one per CPU", low=1
    )
    cluster: str = _execution(
        "", "pack on the workers of this Dask scheduler (pip install '.[cluster]')", metavar="tcp://HOST:PORT"
    )
    json: bool = _execution(False, "print the result as one JSON object")
    dry_run: bool = _action(
        False, "read tables and zip directories, print what would be packed and fetched, and write nothing to --out"
    )
    retry_failed: bool = _action(
        False, "for the finished dataset of this command: fetch what failed again, and rewrite only the affected shards"
    )
    list_classes: bool = _action(
        False, "list all classes of the source, or those of --classes, with their images, masks and boxes per split"
    )
    overwrite: bool = _action(False, "discard another dataset or unfinished build in --out")

    @property
    def has_images(self) -> bool:
        """Whether --images was given."""
        return self.images != [PUBLIC_IMAGES]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names or MIDs of the classes; empty for all classes of the source."""
        return tuple(self.classes or ([] if self.source != "open-images" else DEFAULT_CLASSES))

    @property
    def fractions(self) -> tuple[float, float, float] | None:
        """Shares of train, val and test; None for the source's own splits."""
        return (self.partition or DEFAULT_PARTITION) if self.splits == "partition" else None


def make_parser() -> Parser:
    """Return the parser of `build-shards`."""
    parser = Parser(
        prog="build-shards",
        description="Select images and instance masks of Open Images or other datasets, and pack them into tar shards.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of options by their names, such as `per-class: 1000`; the command line overrides it",
    )
    add_options(parser, BuildOptions)
    return parser


def parse(arguments: Sequence[str] | None = None) -> BuildOptions:
    """Return the options of a command line: defaults, then `--config`, then arguments; UserError for a wrong one."""
    given = make_parser().parse_args(arguments)
    options = BuildOptions()
    if given.config is not None:
        where = f"--config {given.config}"
        try:
            data = Location(given.config).read()
        except StorageError as error:
            raise ConfigError(f"{where}: cannot be read: {error}: give the path of a YAML file") from error
        set_from_yaml(options, data, where)
    set_from_arguments(options, given)
    check(options)
    _check_combinations(options)
    options.drop = sorted(set(options.drop))
    return options


def command_line(options: BuildOptions) -> str:
    """Return the command that builds the same dataset, without options of a single run such as `--workers`.

    It has no credentials: a URL with any of them has to be completed before the command can run.
    """
    full = replace(options, classes=list(options.class_names), partition=options.fractions)
    names = list(entries(BuildOptions))
    always: tuple[str, ...] = ("seed", "images-per-shard", "images", "annotations", "out")
    recorded = names[: names.index("out")]
    if options.source == "yolo" and not options.has_images:
        recorded, always = [name for name in recorded if name != "images"], ("seed", "images-per-shard", *always[3:])
    words = to_words(full, recorded, always)
    return shlex.join(["build-shards", *map(redact_url, words)])


def _check_combinations(options: BuildOptions) -> None:
    """Raise ConfigError for options that need or exclude each other."""
    several = len(options.annotations) > 1
    several_roots = len(options.images) > 1
    if options.partition is not None and options.splits != "partition":
        fault = "--partition needs --splits partition"
    elif options.partition is not None and sum(options.partition) <= 0:
        fault = "--partition: at least one part must be greater than 0"
    elif options.source == "yolo" and (options.annotations == [PUBLIC_ANNOTATIONS] or several or several_roots):
        fault = "--source yolo needs one data.yaml as --annotations, and at most one --images, the root of its paths"
    elif options.source not in ("open-images", "yolo") and (
        options.annotations == [PUBLIC_ANNOTATIONS]
        or (not options.has_images and not (options.list_classes and options.source != "masks"))
    ):
        fault = (
            f"--source {options.source} needs --images (the root of its files) and --annotations "
            f"({'its masks' if options.source == 'masks' else 'its instances JSON'})"
        )
    elif options.class_name and options.source != "masks":
        fault = "--class-name is for --source masks; --classes chooses classes of other sources"
    elif several and options.source == "open-images":
        fault = "--annotations takes one root; several are for --source coco, lvis and masks"
    elif several_roots and options.source == "open-images":
        fault = "--images takes one root; several are for --source coco, lvis and masks"
    elif several and options.splits == "partition":
        fault = "--splits partition cuts a single split: give one place in --annotations"
    elif options.images_list and (options.per_class or options.eval_per_class is not None):
        fault = "--images-list determines the images: omit --per-class and --eval-per-class"
    elif options.keep_empty and options.source == "open-images":
        fault = "--keep-empty is for sources other than open-images, such as --source coco"
    elif options.keep_empty and (options.per_class or options.images_list):
        fault = "--keep-empty packs all images: omit --per-class and --images-list"
    elif not (options.per_class or options.images_list or options.list_classes or options.source != "open-images"):
        fault = "--per-class N is required: how many train images per class (or --images-list)"
    else:
        return
    raise ConfigError(f"{fault} (see --help)")
