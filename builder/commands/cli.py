"""`build-shards`: pack images and masks of Open Images or others into tar shards. Light imports only, for `--help`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from builder.commands.options import BuildOptions, command_line, parse
from builder.sources.openimages.layout import source_location
from shards.commands.command_line import run, say
from shards.common.errors import UserError
from shards.common.redact import RedactingFormatter
from shards.storage.location import Location

if TYPE_CHECKING:
    from builder.commands.build import Summary
    from builder.commands.dry_run import Estimate
    from builder.sources.base import Source

SHORTFALL = 3  # exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, as `--help` lists them."""
    return run(
        "build-shards",
        lambda: _main(argv),
        interrupted="interrupted: finished shards are kept; run the same command again to resume",
    )


def _main(argv: Sequence[str] | None) -> int:
    options = parse(argv)
    _start_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers send SIGTERM for Ctrl-C
    with _cache_folder(options) as cache:
        if options.list_classes:
            say(_classes(options, cache))
            return 0
        result = build_dataset(options, cache)
    say(_render(result, options))
    return SHORTFALL if getattr(result, "shortfalls", ()) else 0


@contextmanager
def _cache_folder(options: BuildOptions) -> Iterator[str]:
    """Yield `--cache`, or with `--no-cache` a temporary folder, because a run reads the same tables twice."""
    if options.no_cache:
        with tempfile.TemporaryDirectory(prefix="maskstream-", ignore_cleanup_errors=True) as folder:
            yield folder
    else:
        yield os.path.abspath(os.path.expanduser(options.cache))


def _start_logging() -> None:
    from shards.commands.progress import LogHandler  # not at the top: --help answers without tqdm

    handler = LogHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("build-shards: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("builder").setLevel(logging.INFO)


def _render(result: Summary | Estimate, options: BuildOptions) -> str:
    from builder.commands.build import Summary
    from builder.commands.summary import render_estimate, render_summary, to_json

    if options.json:
        return to_json(result, options.out)
    return render_summary(result, options.out) if isinstance(result, Summary) else render_estimate(result, options.out)


def _classes(options: BuildOptions, cache: str) -> str:
    from builder.commands.list_classes import list_classes

    source = make_source(options, cache)
    return list_classes(source, options.classes, exact=options.exact_classes, as_json=options.json)


def build_dataset(options: BuildOptions, cache: str) -> Summary | Estimate:
    """Build a dataset, retry what failed in it, or estimate a build; annotation tables are kept in `cache`."""
    from builder.commands.build import build, prepare_build
    from builder.commands.dry_run import estimate
    from builder.commands.retry_failed import retry_failed
    from builder.packing.executors import Engine
    from builder.planning.image_list import ImageList
    from builder.planning.plan_build import BuildScope, plan_build
    from builder.planning.selection import Quotas
    from builder.sources.base import Filters

    eval_per_class = options.eval_per_class
    if eval_per_class is None and options.per_class:
        eval_per_class = max(1, options.per_class // 10)
    source = make_source(options, cache)
    scope = BuildScope(
        options.class_names,
        ImageList(options.images_list) if options.images_list else Quotas(options.per_class, eval_per_class),
        exact_classes=options.exact_classes,
        all_annotations=options.all_annotations,
        filters=Filters(options.min_predicted_iou, tuple(options.drop), options.require_mask),
        partition=options.fractions,
        seed=options.seed,
        images_per_shard=options.images_per_shard,
        keep_empty=options.keep_empty,
        to_jpeg=options.to_jpeg or 0,
    )
    workers = 1 if options.dry_run else options.workers or os.cpu_count() or 1
    engine = Engine(workers, options.cluster)
    make_plan = partial(plan_build, source, scope)
    prepared = prepare_build(source, Location(options.out), make_plan, engine=engine, writes=not options.dry_run)
    if options.dry_run:
        return estimate(prepared)
    if options.retry_failed:
        return retry_failed(prepared, command=command_line(options))
    return build(prepared, overwrite=options.overwrite, command=command_line(options))


def make_source(options: BuildOptions, cache: str) -> Source:
    """Return the source of images and annotations that the options name."""
    locate = partial(source_location, anonymous=options.anonymous)
    if options.source == "yolo":
        from builder.sources.yolo import Yolo

        return Yolo.open(locate(options.annotations[0]), locate(options.images[0]) if options.has_images else None)
    if options.source != "open-images":
        return _listed(options, locate)
    from builder.fetching.table_cache import Cache
    from builder.sources.openimages.source import OpenImages

    tables = Cache(cache, lasting=not options.no_cache)
    return OpenImages(locate(options.images[0]), locate(options.annotations[0]), tables)


def _listed(options: BuildOptions, locate: Callable[[str], Location]) -> Source:
    """Return a source with a root of images and a file or folder of annotations, or one of each per split."""
    from builder.sources.coco import Coco, Lvis
    from builder.sources.listing import parse_places
    from builder.sources.mask_images import MaskImages

    kinds: dict[str, Callable[..., Source]]
    kinds = {"coco": Coco, "lvis": Lvis, "masks": partial(MaskImages, class_name=" ".join(options.class_name.split()))}
    places, named = parse_places(options.annotations)
    files = tuple((split, locate(url)) for split, url in places)
    given, per_split = parse_places(options.images, "--images")
    located = {split: locate(url) for split, url in given}
    if missing := [split for split, _ in files if per_split and split not in located]:
        found = " and ".join(located)
        raise UserError(f"--images has no root for {missing[0]}, only for {found}: add {missing[0]}=URL")
    roots = tuple((split, located[split]) for split, _ in files) if per_split else ()
    return kinds[options.source](located[files[0][0] if per_split else "train"], files, named, roots)


if __name__ == "__main__":
    sys.exit(main())
