"""The command `inspect-shards`: count, verify and show a shard dataset, or extract samples."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from shards.commands.command_line import Parser, run, say
from shards.commands.options import add_options, from_arguments, option
from shards.common.redact import redact, redact_values
from shards.common.text import counted, printable

if TYPE_CHECKING:
    from shards.storage.location import Location

_EPILOG = """\
examples:
  inspect-shards s3://bucket/prefix
  inspect-shards s3://bucket/prefix --html traffic.html --samples 96
  inspect-shards s3://bucket/prefix --verify
  inspect-shards s3://bucket/prefix --extract 000a1249af2bc5f0 --out look

The counts come from the index. Verified labels and flags are not in the index: they are counted in the annotations of
--label-images images per split, chosen by a hash of --seed, and the report says how many these are.

exit status: 0; 1 if --verify finds a fault; 2 with a one-line error; 130 if interrupted; 141 if the output is not read
to its end (| head)
"""


@dataclass
class InspectOptions:
    """Options of `inspect-shards`."""

    root: str = option(
        "", "the dataset: s3://bucket/prefix, a local path, any fsspec URL", positional=True, metavar="URL"
    )
    anonymous: bool = option(False, "do not sign requests (public buckets)")
    json: bool = option(False, "print the counts, or the faults of --verify, as JSON")
    verify: bool = option(
        False,
        "read all shards and check every hash, member, mask and box; print one line per fault",
        exclusive="action",
    )
    html: str = option(
        "", "write one HTML page with the counts and a gallery of samples", metavar="FILE", exclusive="action"
    )
    extract: list[str] = option(
        [], "write the image, JSON and mask PNGs of these images", metavar="ID", exclusive="action"
    )
    out: str = option("extracted", "folder or URL that --extract writes to", metavar="DIR")
    samples: int = option(48, "number of images in the gallery", low=0)
    label_images: int = option(200, "images per split whose annotations are read; 0 reads the index only", low=0)
    seed: int = option(0, "seed of the choice of images", low=0)


def make_parser() -> Parser:
    """Return the parser of `inspect-shards`."""
    parser = Parser(
        prog="inspect-shards",
        description="Count a shard dataset by split and class, verify it, show it as a page, or extract samples.",
        epilog=_EPILOG,
        usage="inspect-shards [options] URL",
    )
    add_options(parser, InspectOptions)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `inspect-shards` and return its exit status."""
    return run(
        "inspect-shards", lambda: _run(from_arguments(InspectOptions, make_parser().parse_args(argv))), show=printable
    )


def _run(options: InspectOptions) -> int:
    # Not at the top: --help answers without pyarrow, whose import takes longer than all else.
    from shards.format.dataset import open_dataset
    from shards.inspect.statistics import count
    from shards.storage.location import Location

    root = Location(options.root, anonymous=options.anonymous)
    if options.verify:
        return _verify(root, as_json=options.json)
    dataset = open_dataset(root)
    if options.extract:
        from shards.inspect.extract import extract

        for image_id in options.extract:
            for place in extract(dataset, image_id, Location(options.out)):
                say(str(place))
        return 0
    splits = count(dataset, label_images=options.label_images, seed=options.seed)
    if options.html:
        from shards.inspect.html_page import make_page

        page, target = make_page(dataset, splits, samples=options.samples, seed=options.seed), Location(options.html)
        target.write(page)
        say(f"{target}: {len(page) / 1e6:.1f} MB")
        return 0
    from shards.inspect.text_report import json_report, text_report

    print(json_report(dataset, splits) if options.json else text_report(dataset, splits))
    return 0


def _report(line: str) -> None:
    print(f"inspect-shards: {line}", file=sys.stderr, flush=True)


def _verify(root: Location, *, as_json: bool) -> int:
    from shards.commands.progress import Progress
    from shards.inspect.shard_check import Checked
    from shards.inspect.verify import Verification

    started = time.monotonic()
    verification, checked = Verification(root), Checked()
    with Progress("verifying", verification.total / 1e6, "MB", _report) as progress:
        for part in verification.run(lambda nbytes: progress.advance(nbytes / 1e6)):
            checked.add(part)
            for fault in () if as_json else part.faults:
                say(str(fault))
    if verification.note:
        print(redact(f"inspect-shards: note: {verification.note}"), file=sys.stderr)
    if as_json:
        print(json.dumps(redact_values({"root": str(root), **asdict(checked)}), indent=2))
    else:
        predicted = f", {counted(checked.predicted, 'predicted mask')}" if checked.predicted else ""
        print(
            f"{counted(len(checked.faults), 'fault') if checked.faults else 'no fault'}: "
            f"{counted(checked.samples, 'sample')} in {counted(checked.shards, 'shard')}, "
            f"{counted(checked.boxes, 'box', 'boxes')}, {counted(checked.masks, 'mask')}{predicted}, "
            f"{checked.nbytes / 1e6:.1f} MB read in {time.monotonic() - started:.1f} s"
        )
    return 1 if checked.faults else 0
